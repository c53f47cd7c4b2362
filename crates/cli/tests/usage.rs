//! What is written wrongly ends the command with exit code 2, before a server is asked.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::path::Path;
use std::process::{Command, Output};

/// Nobody serves here (RFC 863: discard), so a command that asks a server ends with 3.
const NO_SERVER: &str = "http://127.0.0.1:9";

fn run(folder: &Path, arguments: &str) -> std::io::Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_genmill"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("GENMILL")) {
        command.env_remove(name);
    }
    command.env("GENMILL_SERVER", NO_SERVER).current_dir(folder).args(arguments.split(' ')).output()
}

/// In a folder with a file of that name and text.
fn run_beside((name, text): (&str, &str), arguments: &str) -> std::io::Result<Output> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join(name), text)?;
    run(folder.path(), arguments)
}

fn check(file: (&str, &str), arguments: &str, expect: i32, says: &str) {
    let Output { status, stdout, stderr } = run_beside(file, arguments).unwrap();
    let stderr = String::from_utf8_lossy(&stderr);
    assert_eq!(status.code(), Some(expect), "{arguments}: {stderr}");
    assert_eq!(stderr.matches(says).count(), 1, "{arguments}: `{says}` in {stderr}");
    assert!(stdout.is_empty(), "{arguments}");
}

const NOTHING: (&str, &str) = ("nothing", "");

#[test]
fn a_wrong_file_of_messages_is_wrong_usage() {
    let submit = "submit --model vllm_x --messages-file chat";
    check(NOTHING, submit, 2, "cannot read chat");
    check(("chat", "[{role: boss, content: a}]"), submit, 2, "[0].role");
    check(("chat", "[{role: user, content: a}]"), submit, 3, "cannot reach the server");
}

#[test]
fn a_wrong_experiment_is_wrong_usage() {
    let run = "experiment run it.yaml";
    check(NOTHING, run, 2, "cannot read it.yaml");
    check(("it.yaml", "nam: x"), run, 2, "did you mean `name`?");
    check(("it.yaml", "{name: x, models: [vllm_a], prompts_file: p}"), run, 2, "cannot read p");
    check(("it.yaml", "{name: x, models: [vllm_a], prompts: [{prompt: a}]}"), run, 3, "cannot reach the server");
}

#[test]
fn a_wrong_address_is_wrong_usage() {
    check(NOTHING, "--server redis://a:1 models", 2, "is not a server's address");
    check(NOTHING, "--server 127.0.0.1:99999 models", 2, "is not a server's address");
    check(NOTHING, "models", 3, "cannot reach the server");
}

#[test]
fn a_wrong_job_id_is_wrong_usage() {
    check(NOTHING, "get nope", 2, "`nope` is not a job id");
    check(NOTHING, "get 0199a1b2-c3d4-8e5f-8001-23456789abcd", 3, "cannot reach the server");
}

#[test]
fn a_mill_that_is_configured_wrongly_is_not_started() {
    check(NOTHING, "up --config nofile", 2, "nofile does not exist");
    check(NOTHING, "up --models /no/such/dir", 2, "/no/such/dir: there is no such folder");
    check(NOTHING, "up --listen nonsense", 2, "`nonsense`");
    check(NOTHING, "up --redis nonsense", 2, "`nonsense`");
    check(("genmill.toml", "[scheduler]\nlissten = \"x\""), "up", 2, "did you mean `listen`?");
    check((".env", "A=1\nB=\"x\n"), "up", 2, ".env, line 2");
}

#[test]
fn check_config_prints_configuration_and_models() {
    let models = ("hf_models.yaml", "models: [gpt2]");
    let output = run_beside(models, "up --models . --listen h:1 --check-config").unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(text.contains("listen = \"h:1\"") && text.contains("#   gpt2 (./hf_models.yaml)"), "{text}");
}
