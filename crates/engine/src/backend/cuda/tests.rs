//! The whole backend on the kernels compiled for the host: every fixture's logits, and the promise that they do not
//! depend on chunks or neighbours.

use super::*;
use crate::backend::cuda::check::Dice;
use crate::backend::cuda::emulator::Emulator;
use crate::decoder::tests::fixtures;

/// Every fixture on a device of this type.
fn check_fixtures(dtype: Dtype) {
    let Some(device) = Emulator::start() else { return };
    let mut done = 0;
    for folder in fixtures() {
        match check::model::fixture(&device, &folder, dtype) {
            Ok(Some(apart)) => {
                println!("{}: {apart}", folder.display());
                done += 1;
            }
            Ok(None) => println!("{}: heads of a width that there is no kernel for", folder.display()),
            Err(wrong) => panic!("{}: {wrong}", folder.display()),
        }
    }
    assert!(done >= 15, "{done}");
}

#[test]
fn bfloat16_is_near_transformers_and_does_not_depend_on_chunks_or_neighbours() {
    check_fixtures(Dtype::Bf16);
}

#[test]
fn float16_is_near_transformers() {
    check_fixtures(Dtype::F16);
}

#[test]
fn random_schedules_with_cancellations_change_no_text() {
    let Some(device) = Emulator::start() else { return };
    for name in ["gpt2", "mistral"] {
        let folder = fixtures().into_iter().find(|folder| folder.ends_with(name)).unwrap();
        let mut dice = Dice::new(11);
        if let Err(wrong) = check::schedules::schedules(&device, &folder, 6, &mut dice) {
            panic!("{name}: {wrong}");
        }
    }
}

#[test]
fn a_device_that_fails_gives_no_numbers() {
    let Some(device) = Emulator::start() else { return };
    let backend = Cuda::new(device, Dtype::Bf16);
    let mut buffer = backend.upload(vec![1.0, 2.0]);
    assert_eq!(backend.read(&mut buffer, 2), [1.0, 2.0]);
    let heads = Heads { queries: 1, keys: 1, width: 7, scale: 1.0, cap: None, window: None };
    drop(backend.cache(1, 1, &heads));
    assert!(backend.fault().unwrap().contains("heads of 7 values"));
    assert!(backend.read(&mut buffer, 2).iter().all(|value| value.is_nan()));
}
