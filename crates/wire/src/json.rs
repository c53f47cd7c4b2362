//! Messages as proto3 JSON with the proto's own field names.

use crate::DESCRIPTORS;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use std::sync::LazyLock;

static POOL: LazyLock<Result<DescriptorPool, String>> =
    LazyLock::new(|| DescriptorPool::decode(DESCRIPTORS).map_err(|error| error.to_string()));

/// Why a message could not be turned into JSON: a defect, since both sides come from the same `proto/`.
#[derive(Debug, thiserror::Error)]
#[error("cannot write a {message} as JSON: {problem}")]
pub struct JsonError {
    message: &'static str,
    problem: String,
}

/// Writes the message `genmill.v1.NAME` as one line of proto3 JSON with the proto's field names. Fields that have
/// their default value are left out, as proto3 JSON does.
///
/// # Errors
/// [`JsonError`] when `message` is not of the type that `name` says.
pub fn to_json(name: &'static str, message: &impl prost::Message) -> Result<String, JsonError> {
    let fail = |problem: String| JsonError { message: name, problem };
    let pool = POOL.as_ref().map_err(|problem| fail(problem.clone()))?;
    let descriptor = pool
        .get_message_by_name(&format!("genmill.v1.{name}"))
        .ok_or_else(|| fail("no such message in proto/".to_owned()))?;
    let dynamic = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())
        .map_err(|error| fail(error.to_string()))?;
    let mut line = Vec::new();
    let mut serializer = serde_json::Serializer::new(&mut line);
    let options = SerializeOptions::new().use_proto_field_name(true);
    dynamic.serialize_with_options(&mut serializer, &options).map_err(|error| fail(error.to_string()))?;
    String::from_utf8(line).map_err(|error| fail(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1;

    #[test]
    fn names_are_those_of_the_proto_and_numbers_of_64_bits_are_strings() {
        let job = v1::Job {
            id: "x".to_owned(),
            state: v1::JobState::Succeeded.into(),
            result: Some(v1::Result {
                text: "ä\n".to_owned(),
                finish_reason: v1::FinishReason::Stop.into(),
                usage: Some(v1::Usage { prompt_tokens: 3, ..v1::Usage::default() }),
                ..v1::Result::default()
            }),
            created_at: Some(prost_types::Timestamp { seconds: 0, nanos: 500_000_000 }),
            ..v1::Job::default()
        };
        let json = to_json("Job", &job).unwrap();
        assert_eq!(
            json,
            "{\"id\":\"x\",\"state\":\"JOB_STATE_SUCCEEDED\",\"created_at\":\"1970-01-01T00:00:00.500Z\",\"result\":\
             {\"text\":\"ä\\n\",\"finish_reason\":\"FINISH_REASON_STOP\",\"usage\":{\"prompt_tokens\":\"3\"}}}"
        );
    }
}
