//! Whether what is sent keeps to the schemas that vendors publish: those in the folder that `GENMILL_SPECS` names, of which
//! none is kept here. Without it nothing is checked, and the test says so.

mod documents;
mod json;
mod proto;
mod requests;

use documents::{Operation, operations};
use requests::requests;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;

/// Where schemas are.
const VARIABLE: &str = "GENMILL_SPECS";

#[test]
fn what_is_sent_keeps_to_published_schemas() {
    let Some(folder) = std::env::var_os(VARIABLE) else {
        eprintln!("{VARIABLE} names no folder of published schemas: nothing is checked");
        return;
    };
    let mut wrong = String::new();
    let mut checked = 0;
    for operation in operations(Path::new(&folder)) {
        let requests = requests(operation.dialect, operation.provider.as_deref());
        let problems = problems(&operation, &requests);
        eprintln!("{}: {} requests, {} problems", operation.place, requests.len(), problems.len());
        checked += requests.len();
        wrong.extend(problems);
    }
    assert!(checked > 0, "{VARIABLE} has no schema of a known operation");
    assert!(wrong.is_empty(), "{wrong}");
}

/// What is wrong with the requests of an operation: each problem once, with the first request that has it.
fn problems(operation: &Operation, requests: &[(String, Value)]) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let mut told = Vec::new();
    for (about, body) in requests {
        let new = operation.schema.problems(body).into_iter().filter(|problem| seen.insert(problem.clone()));
        told.extend(new.map(|problem| format!("{}: {problem}\n  first in: {about}\n", operation.place)));
    }
    told
}
