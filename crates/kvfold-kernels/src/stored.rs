//! Memory for weights that are read and never written again.
//!
//! Decoding reads every weight once a token, and finding out where a page of 4 KiB is costs time that a huge page saves. A
//! projection by itself seldom fills a huge page, so weights lie one after the other in few large regions.

use crate::aligned::{CACHE_LINE, HUGE_PAGE, ask_for_huge_pages};
use bytemuck::Pod;
use bytes::{Bytes, BytesMut};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

/// Bytes of a region, of which only what is written takes memory.
const REGION: usize = 64 << 20;

/// What is left of the newest region.
#[derive(Debug, Default)]
pub(crate) struct Store(Mutex<BytesMut>);

impl Store {
    /// Room for `len` numbers, all 0, that begins at a cache line.
    pub(crate) fn room<T: Pod>(&self, len: usize) -> Room<T> {
        let bytes = (len * size_of::<T>()).next_multiple_of(CACHE_LINE);
        let mut rest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if rest.len() < bytes {
            *rest = region(bytes.max(REGION));
        }
        let mut room = rest.split_to(bytes);
        room.truncate(len * size_of::<T>());
        Room { bytes: room, numbers: PhantomData }
    }
}

/// Memory that begins at a huge page and is backed by such where the system has them.
fn region(bytes: usize) -> BytesMut {
    let mut memory = BytesMut::zeroed(bytes + HUGE_PAGE);
    let before = memory.as_ptr().align_offset(HUGE_PAGE);
    let mut region = memory.split_off(before);
    ask_for_huge_pages(region.as_mut_ptr(), region.len());
    region
}

/// Numbers that are being written.
#[derive(Debug)]
pub(crate) struct Room<T> {
    bytes: BytesMut,
    numbers: PhantomData<T>,
}

impl<T> Room<T> {
    /// The numbers, from now on only read.
    pub(crate) fn stored(self) -> Stored<T> {
        Stored { bytes: self.bytes.freeze(), numbers: PhantomData }
    }
}

impl<T: Pod> Deref for Room<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(&self.bytes)
    }
}

impl<T: Pod> DerefMut for Room<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.bytes)
    }
}

/// Numbers that stay as they are. Their region is given back with the last of them.
#[derive(Debug)]
pub(crate) struct Stored<T> {
    bytes: Bytes,
    numbers: PhantomData<T>,
}

impl<T: Pod> Deref for Stored<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(&self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_lie_side_by_side_and_do_not_touch() {
        let store = Store::default();
        let stored: Vec<Stored<u32>> = [1, 100, 16, 0, 70_000, 3]
            .into_iter()
            .enumerate()
            .map(|(n, len)| {
                let mut room = store.room::<u32>(len);
                assert!(room.len() == len && room.iter().all(|&x| x == 0));
                room.fill(n as u32);
                room.stored()
            })
            .collect();
        assert_eq!(stored[0].as_ptr() as usize % HUGE_PAGE, 0);
        for (n, numbers) in stored.iter().enumerate() {
            assert!(numbers.iter().all(|&x| x == n as u32), "weight {n}");
            assert_eq!(numbers.as_ptr() as usize % CACHE_LINE, 0, "weight {n}");
        }
        let bytes = |n: usize| stored[n].as_ptr() as usize - stored[0].as_ptr() as usize;
        assert_eq!((bytes(1), bytes(2), bytes(4)), (64, 64 + 448, 64 + 448 + 64));
    }

    #[test]
    fn what_no_region_holds_gets_its_own() {
        let store = Store::default();
        let (small, large) = (store.room::<u8>(5).stored(), store.room::<u16>(REGION).stored());
        assert_eq!((small.len(), large.len()), (5, REGION));
        assert_eq!((large[REGION - 1], large.as_ptr() as usize % HUGE_PAGE), (0, 0));
    }
}
