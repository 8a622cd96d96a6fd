//! Prints the instruction sets that kernels can use on this machine, the best last.

fn main() {
    for level in kvfold_kernels::simd::Level::available() {
        println!("{level:?}");
    }
}
