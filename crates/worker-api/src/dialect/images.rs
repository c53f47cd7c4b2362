//! What a message says and shows, in the forms that several dialects share. Never here: which dialect takes what.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use genmill_core::image::{Detail, Image, ImageBytes, MediaType, Part, Source};
use genmill_core::request::ChatMessage;
use serde_json::{Value, json};

/// What a message says, each text and each image in a dialect's form. An empty text is no part.
pub(super) fn parts(message: &ChatMessage, text: fn(&str) -> Value, image: fn(&Image) -> Value) -> Vec<Value> {
    let content = (!message.content.is_empty()).then(|| text(&message.content));
    let part = |part: &Part| match part {
        Part::Text(said) => (!said.is_empty()).then(|| text(said)),
        Part::Image(shown) => Some(image(shown)),
    };
    content.into_iter().chain(message.parts.iter().filter_map(part)).collect()
}

/// What a message says as chat completions have it: a text, or a list when there are images.
pub(super) fn chat_content(message: &ChatMessage) -> Value {
    if message.parts.is_empty() {
        return json!(message.content);
    }
    let text = |text: &str| json!({"type": "text", "text": text});
    let image = |image: &Image| {
        let mut out = json!({"type": "image_url", "image_url": {"url": address(image)}});
        if let Some(detail) = image.detail {
            out["image_url"]["detail"] = json!(detail.name());
        }
        out
    };
    Value::Array(parts(message, text, image))
}

/// Where an image is: its URL, or one that has its bytes in itself.
pub(super) fn address(image: &Image) -> String {
    match &image.source {
        Source::Url(url) => url.clone(),
        Source::Data(bytes) => format!("data:{};base64,{}", media_type(image), base64(bytes)),
    }
}

/// The form of an image whose bytes are known.
pub(super) fn media_type(image: &Image) -> &'static str {
    image.media_type.map(MediaType::name).unwrap_or_default()
}

/// Bytes as text.
pub(super) fn base64(bytes: &ImageBytes) -> String {
    BASE64_STANDARD.encode(bytes)
}

/// How closely the model is to look, in a word.
pub(super) fn detail(image: &Image) -> &'static str {
    image.detail.unwrap_or(Detail::Auto).name()
}
