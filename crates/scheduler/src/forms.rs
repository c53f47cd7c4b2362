//! Whether the form that a request wants for its text can be compiled, and its tools are JSON: nothing malformed gets
//! into the queue. Never here: tokens of any model, for a form is checked byte by byte.

use genmill_core::controls::{Controls, StructuredOutput, Tool};
use genmill_core::job::JobSpec;
use genmill_core::request::Invalid;
use genmill_grammar::{Compiler, Form};
use genmill_wire::error::{ApiError, Reason};
use std::sync::{Arc, OnceLock};

/// Checks forms. Clones share what was compiled last.
#[derive(Clone, Default)]
pub(crate) struct Forms(Arc<OnceLock<Option<Compiler>>>);

impl Forms {
    /// Checks what a job wants.
    ///
    /// # Errors
    /// [`ApiError`] when this process cannot tell.
    pub(crate) async fn check(&self, spec: &JobSpec) -> Result<Result<(), Invalid>, ApiError> {
        let controls = &spec.sampling.controls;
        if controls.structured_output.is_none() && controls.tools.is_empty() {
            return Ok(Ok(()));
        }
        let (forms, controls, remote) = (self.clone(), controls.clone(), spec.model.prefix().is_remote());
        // Compiling takes milliseconds, in which others could be answered.
        let checking = tokio::task::spawn_blocking(move || forms.check_here(&controls, remote));
        checking.await.map_err(|_| ApiError::new(Reason::Internal, "checking the form of the text broke off"))?
    }

    fn check_here(&self, controls: &Controls, remote: bool) -> Result<Result<(), Invalid>, ApiError> {
        if let Some(problem) = controls.tools.iter().find_map(malformed) {
            return Ok(Err(problem));
        }
        let Some(wanted) = &controls.structured_output else { return Ok(Ok(())) };
        if let (StructuredOutput::JsonSchema(schema), true) = (wanted, remote) {
            // What a provider makes of a schema is its own affair, as long as it is one.
            return Ok(object(schema).map_err(|problem| Invalid::new(wanted.field(), problem)));
        }
        let compiler = self.0.get_or_init(|| Compiler::of_bytes().ok()).as_ref();
        let compiler = compiler.ok_or_else(|| ApiError::new(Reason::Internal, "no form can be compiled"))?;
        let compiled = compiler.compile(&form(wanted)).map(drop);
        Ok(compiled.map_err(|error| Invalid::new(wanted.field(), error.to_string())))
    }
}

fn form(wanted: &StructuredOutput) -> Form {
    match wanted.clone() {
        StructuredOutput::JsonSchema(schema) => Form::JsonSchema(schema),
        StructuredOutput::Regex(regex) => Form::Regex(regex),
        StructuredOutput::Choice(choices) => Form::Choice(choices),
        StructuredOutput::Lark(grammar) => Form::Lark(grammar),
    }
}

fn malformed(tool: &Tool) -> Option<Invalid> {
    if tool.parameters.is_empty() {
        return None;
    }
    let problem = object(&tool.parameters).err()?;
    Some(Invalid::new("tools", format!("the parameters of `{}`: {problem}", tool.name)))
}

fn object(text: &str) -> Result<(), String> {
    match serde_json::from_str::<serde_json::Value>(text) {
        Ok(value) if value.is_object() => Ok(()),
        Ok(_) => Err("a JSON schema is an object".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
