//! The whole backend on the kernels compiled for the host: every fixture's logits, and the promise that they do not
//! depend on chunks or neighbours.

use super::*;
use crate::backend::cuda::emulator::Emulator;
use crate::decoder::tests::fixtures;

#[test]
fn fixtures_are_near_transformers_and_do_not_depend_on_chunks_or_neighbours() {
    let Some(device) = Emulator::start() else { return };
    let mut done = 0;
    for folder in fixtures() {
        for dtype in [Dtype::Bf16, Dtype::F16] {
            match check::model::fixture(&device, &folder, dtype) {
                Ok(Some(apart)) => {
                    println!("{}, {dtype:?}: {apart}", folder.display());
                    done += 1;
                }
                Ok(None) => println!("{}: heads of a width that there is no kernel for", folder.display()),
                Err(wrong) => panic!("{}, {dtype:?}: {wrong}", folder.display()),
            }
        }
    }
    assert!(done >= 20, "{done}");
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
