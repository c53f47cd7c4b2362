//! What is refused, what is let through, what is forced.

use super::*;

fn refused(form: &Form, says: &str) {
    let error = Compiler::of_bytes().unwrap().compile(form).unwrap_err().to_string();
    assert!(error.to_lowercase().contains(says), "{error}");
}

/// Whether the bytes of `text` are a text of this form.
fn fits(form: &Form, text: &str) -> bool {
    let mut guide = Compiler::of_bytes().unwrap().compile(form).unwrap();
    for byte in text.bytes() {
        if guide.is_whole() || !guide.mask().unwrap().allows(u32::from(byte)) {
            return false;
        }
        guide.take(u32::from(byte)).unwrap();
    }
    // The end token of the byte tokenizer is its last.
    guide.is_whole() || guide.mask().unwrap().allows(261)
}

#[test]
fn a_malformed_form_is_refused_in_the_words_of_its_parser() {
    let schema = |text: &str| Form::JsonSchema(text.to_owned());
    refused(&schema("{"), "eof");
    refused(&schema("3"), "a json schema is an object");
    refused(&schema(r#"{"type": "objekt"}"#), "objekt");
    refused(&schema(r##"{"$ref": "#/nowhere"}"##), "nowhere");
    refused(&Form::Regex("(a".to_owned()), "unclosed");
    refused(&Form::Lark("start: x".to_owned()), "x");
    refused(&Form::Lark("start: \"a".to_owned()), "");
}

#[test]
fn a_form_lets_through_its_texts_and_no_others() {
    let schema = Form::JsonSchema(
        r#"{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}"#.to_owned(),
    );
    assert!(fits(&schema, r#"{"a": 12}"#) && !fits(&schema, r#"{"a": "x"}"#) && !fits(&schema, r#"{"a": 12"#));
    let regex = Form::Regex("[a-c]{2,3}".to_owned());
    assert!(fits(&regex, "abc") && !fits(&regex, "a") && !fits(&regex, "abd"));
    let choice = Form::Choice(["yes", "no (really)", "a.b*", "-~#&/"].map(str::to_owned).to_vec());
    for text in ["yes", "no (really)", "a.b*", "-~#&/"] {
        assert!(fits(&choice, text), "{text}");
    }
    assert!(!fits(&choice, "axb*") && !fits(&choice, "ye") && !fits(&choice, "yesno"));
    let lark = Form::Lark("start: \"(\" start \")\" | \"x\"".to_owned());
    assert!(fits(&lark, "((x))") && !fits(&lark, "((x)"));
}

#[test]
fn what_must_come_is_forced_and_a_kept_form_begins_anew() {
    let compiler = Compiler::of_bytes().unwrap();
    let form = Form::Choice(vec!["alpha".to_owned(), "beta".to_owned()]);
    for _ in 0..2 {
        let mut guide = compiler.compile(&form).unwrap();
        guide.take(u32::from(b'b')).unwrap();
        let mut other = guide.fork();
        assert_eq!(guide.take_forced(), b"eta".map(u32::from));
        assert!(guide.is_whole());
        assert!(other.take(u32::from(b'l')).is_err());
    }
    assert_eq!(compiler.kept.lock().unwrap().len(), 1);
}

#[test]
fn only_so_many_forms_are_kept() {
    let compiler = Compiler::of_bytes().unwrap();
    for n in 0..KEPT + 8 {
        compiler.compile(&Form::Regex(format!("a{{{}}}", n + 1))).unwrap();
    }
    assert_eq!(compiler.kept.lock().unwrap().len(), KEPT);
}
