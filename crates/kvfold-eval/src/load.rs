//! What else ran on the machine while something was measured, as the system accounts for it.

use serde::Serialize;
use std::fs::read_to_string;

/// Cores' worth of work below which a measurement counts as undisturbed.
const QUIET: f64 = 0.1;

/// A moment's accounts, in ticks of processor time.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    all: System,
    ours: u64,
}

/// The system's accounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct System {
    /// Ticks in which a processor worked for somebody.
    busy: u64,
    /// Ticks in which a processor was wanted and the host ran something else.
    stolen: u64,
    /// All ticks of all processors.
    total: u64,
    processors: u64,
}

/// What others took of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Others {
    /// Processors that other programs kept busy, on average.
    pub cores: f64,
    /// Processors that the host of a virtual machine took away, on average.
    pub stolen: f64,
}

impl Load {
    /// The accounts now; none where the system keeps none.
    pub fn now() -> Option<Self> {
        let read = |path: &str| read_to_string(path).ok();
        Some(Self { all: system(&read("/proc/stat")?)?, ours: process(&read("/proc/self/stat")?)? })
    }

    /// What others took from then until now.
    pub fn others_since(&self, then: &Self) -> Others {
        let share = |ticks: u64| match self.all.total.saturating_sub(then.all.total) {
            0 => 0.0,
            total => ticks as f64 * self.all.processors as f64 / total as f64,
        };
        let ours = self.ours.saturating_sub(then.ours);
        Others {
            cores: share(self.all.busy.saturating_sub(then.all.busy).saturating_sub(ours)),
            stolen: share(self.all.stolen.saturating_sub(then.all.stolen)),
        }
    }
}

impl Others {
    /// What to tell somebody who may think that the numbers are the machine's best.
    pub fn warning(&self) -> Option<String> {
        let programs = (self.cores >= QUIET).then(|| format!("other programs used {:.1} processors", self.cores));
        let host = (self.stolen >= QUIET).then(|| format!("the host took {:.1} processors away", self.stolen));
        let both: Vec<String> = programs.into_iter().chain(host).collect();
        (!both.is_empty())
            .then(|| format!("while this was measured, {}; the numbers are lower for it", both.join(" and ")))
    }
}

/// Reads `/proc/stat`: user, nice, system, idle, iowait, irq, softirq, steal.
fn system(text: &str) -> Option<System> {
    let all: Vec<u64> = text.lines().next()?.strip_prefix("cpu ")?.split_whitespace().flat_map(str::parse).collect();
    let [user, nice, system, idle, iowait, irq, softirq, stolen] = *all.first_chunk()?;
    let busy = user + nice + system + irq + softirq;
    let processors = text.lines().skip(1).filter(|line| line.starts_with("cpu")).count() as u64;
    Some(System { busy, stolen, total: busy + stolen + idle + iowait, processors })
}

/// Reads `/proc/self/stat`: user and system time, the 12th and 13th after the name, which may hold anything.
fn process(text: &str) -> Option<u64> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut times = rest.split_whitespace().skip(11).map(str::parse::<u64>);
    Some(times.next()?.ok()? + times.next()?.ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "cpu  100 20 30 400 50 1 9 40 0 0\ncpu0 1 1 1 1\ncpu1 1 1 1 1\nintr 9\n";

    #[test]
    fn accounts_are_read() {
        assert_eq!(system(STAT), Some(System { busy: 160, stolen: 40, total: 650, processors: 2 }));
        assert_eq!(process("7 (a b) c) R 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20"), Some(300));
        for broken in ["", "cpu 1 2", "nothing"] {
            assert_eq!(system(broken), None);
            assert_eq!(process(broken), None);
        }
    }

    #[test]
    fn what_is_not_ours_is_of_others() {
        let at = |busy, stolen, total, ours| Load { all: System { busy, stolen, total, processors: 2 }, ours };
        // 1000 ticks of two processors: 500 of ours, 250 of others, 50 stolen.
        let others = at(850, 60, 2000, 520).others_since(&at(100, 10, 1000, 20));
        assert_eq!(others, Others { cores: 0.5, stolen: 0.1 });
        let warning = others.warning().unwrap();
        assert!(warning.contains("used 0.5 processors and the host took 0.1"), "{warning}");
        let now = at(1, 1, 1, 1);
        assert_eq!(now.others_since(&now), Others { cores: 0.0, stolen: 0.0 });
        assert_eq!(now.others_since(&now).warning(), None);
    }
}
