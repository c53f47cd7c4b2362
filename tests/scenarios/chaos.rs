//! A minute of chaos with a seed of its own each time: whatever goes wrong, the promises hold.

use genmill_tests::chaos::Run;
use genmill_tests::chaos::report::replay;
use std::hash::{BuildHasher as _, RandomState};

#[tokio::test(flavor = "multi_thread")]
async fn promises_hold_through_a_minute_of_faults() {
    // The standard library's hash keys are random; there is no other source of random numbers in it.
    let run = Run { minutes: 1, seed: RandomState::new().hash_one(0) };
    // Shown even when the runner ends this test because it hangs.
    eprintln!("{}", replay(&run));
    let report = run.make().await.unwrap();
    eprintln!("{report}");
    assert!(report.violations.is_empty(), "promises were broken");
}
