//! Images of a conversation as people name them: a file, an address, or what chat APIs write. Never here: what an image
//! may be, which the server checks.

use anyhow::{Context as _, bail};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use genmill_client::v1;
use serde::Deserialize;
use std::path::PathBuf;

/// A part of a message as chat APIs write it, and beside it a file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Part {
    /// Text.
    Text {
        /// The text.
        text: String,
    },
    /// A picture at an address, or within it.
    ImageUrl {
        /// The address.
        image_url: Address,
    },
    /// A picture in a file.
    Image {
        /// The file.
        file: PathBuf,
        /// How closely the model is to look.
        #[serde(default)]
        detail: Option<Detail>,
    },
}

/// An address, bare or with what goes with it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub(crate) enum Address {
    /// The address alone.
    Bare(String),
    /// With more.
    Full {
        /// The address.
        url: String,
        /// How closely the model is to look.
        #[serde(default)]
        detail: Option<Detail>,
    },
}

/// How closely a model looks.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Detail {
    /// As the provider decides.
    Auto,
    /// At a small copy.
    Low,
    /// At all of it.
    High,
}

impl Part {
    /// The part as a request carries it; a file is read.
    pub(crate) fn into_message(self) -> anyhow::Result<v1::ContentPart> {
        let (source, detail) = match self {
            Self::Text { text } => return Ok(v1::ContentPart::text(text)),
            Self::ImageUrl { image_url: Address::Bare(url) } => (at(&url)?, None),
            Self::ImageUrl { image_url: Address::Full { url, detail } } => (at(&url)?, detail),
            Self::Image { file, detail } => {
                let bytes = std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
                (v1::image::Source::Data(bytes), detail)
            }
        };
        let detail = match detail {
            None => v1::ImageDetail::Unspecified,
            Some(Detail::Auto) => v1::ImageDetail::Auto,
            Some(Detail::Low) => v1::ImageDetail::Low,
            Some(Detail::High) => v1::ImageDetail::High,
        };
        Ok(v1::ContentPart::of(v1::Image { detail: detail.into(), ..source.into() }))
    }

    /// The picture that a word of the command line names: an address, or else a file.
    pub(crate) fn named(word: String) -> Self {
        let is_address = ["http://", "https://", "data:"].iter().any(|start| word.starts_with(start));
        if is_address {
            Self::ImageUrl { image_url: Address::Bare(word) }
        } else {
            Self::Image { file: word.into(), detail: None }
        }
    }
}

/// What an address leads to: a data: URL has the bytes in itself.
fn at(url: &str) -> anyhow::Result<v1::image::Source> {
    let Some(data) = url.strip_prefix("data:") else {
        return Ok(v1::image::Source::Url(url.to_owned()));
    };
    let Some((_, data)) = data.split_once(";base64,") else {
        bail!("an image in a data: URL must be written in base64");
    };
    let bytes = BASE64_STANDARD.decode(data).context("an image in a data: URL is no base64")?;
    Ok(v1::image::Source::Data(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use v1::image::Source;

    fn source(part: Part) -> anyhow::Result<Source> {
        let Some(v1::content_part::Part::Image(image)) = part.into_message()?.part else { bail!("text") };
        image.source.context("nothing")
    }

    #[test]
    fn a_word_names_an_address_its_own_bytes_or_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.png");
        std::fs::write(&file, b"abc").unwrap();
        let named = |word: &str| source(Part::named(word.to_owned()));
        assert_eq!(named("https://example.com/a").unwrap(), Source::Url("https://example.com/a".to_owned()));
        assert_eq!(named("data:image/png;base64,YWJj").unwrap(), Source::Data(b"abc".to_vec()));
        assert_eq!(named(file.to_str().unwrap()).unwrap(), Source::Data(b"abc".to_vec()));
        for bad in ["data:image/png,abc", "data:image/png;base64,???", "no/such/file"] {
            assert!(named(bad).is_err(), "{bad}");
        }
    }
}
