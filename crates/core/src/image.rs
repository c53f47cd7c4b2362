//! Pictures in a conversation: what they are and what they must be. Never here: how a provider is sent them, and what is
//! behind a URL, which only the provider asks.

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::sync::Arc;

/// A piece of what a message says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Text.
    Text(String),
    /// A picture.
    Image(Image),
}

/// A picture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Where it is.
    pub source: Source,
    /// Its form; `None`: it is not known of what is behind a URL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<MediaType>,
    /// How closely the model is to look; as its provider decides when unset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<Detail>,
}

/// Where a picture is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// At an address (http or https), from which the provider fetches it.
    Url(String),
    /// Here.
    Data(ImageBytes),
}

/// The bytes of a picture; copies share them.
#[derive(Clone, PartialEq, Eq)]
pub struct ImageBytes(Arc<[u8]>);

/// The forms of pictures that providers take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MediaType {
    /// Portable network graphics.
    Png,
    /// A photograph.
    Jpeg,
    /// The old form of small pictures.
    Gif,
    /// Google's.
    Webp,
}

/// How closely a model looks at a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Detail {
    /// As the provider decides.
    Auto,
    /// At a small copy, for few tokens.
    Low,
    /// At all of it.
    High,
}

impl Detail {
    /// The name that providers use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Low => "low",
            Self::High => "high",
        }
    }
}

/// The longest address of a picture, in bytes.
const URL_BYTES_MAX: usize = 8 * 1024;

/// All forms.
const FORMS: [MediaType; 4] = [MediaType::Png, MediaType::Jpeg, MediaType::Gif, MediaType::Webp];

impl MediaType {
    /// Its name in HTTP.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Jpeg => "image/jpeg",
            Self::Gif => "image/gif",
            Self::Webp => "image/webp",
        }
    }

    /// Its name without `image/`.
    #[must_use]
    pub fn format(self) -> &'static str {
        self.name().trim_start_matches("image/")
    }

    /// The form of a name; `None` when it is another one.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        let name = if name == "image/jpg" { "image/jpeg" } else { &name };
        FORMS.into_iter().find(|form| form.name() == name)
    }

    /// The form that bytes have by how they begin.
    #[must_use]
    pub fn of_bytes(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Some(Self::Png),
            [0xff, 0xd8, 0xff, ..] => Some(Self::Jpeg),
            [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => Some(Self::Gif),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Some(Self::Webp),
            _ => None,
        }
    }

    /// The form that the end of an address promises.
    #[must_use]
    fn of_url(url: &str) -> Option<Self> {
        let path = url.split(['?', '#']).next().unwrap_or_default();
        let (_, ending) = path.rsplit_once('/')?.1.rsplit_once('.')?;
        Self::parse(&format!("image/{ending}"))
    }
}

impl Image {
    /// About so many tokens is a picture, whatever its size in bytes: what providers make of a photograph.
    pub const TOKENS: u64 = 1_000;

    /// A picture at an address. What form it has is told by `media_type` (empty: not told), else by the address, else
    /// unknown.
    ///
    /// # Errors
    /// What is wrong, and what would be right.
    pub fn at(url: String, media_type: &str) -> Result<Self, String> {
        let host = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
        let host = host.and_then(|rest| rest.split(['/', '?', '#']).next());
        if host.is_none_or(str::is_empty) {
            return Err("an image's url must begin with http:// or https:// and name a host; send other pictures as \
                        their bytes, in `data`"
                .to_owned());
        }
        if url.len() > URL_BYTES_MAX || url.chars().any(|letter| letter.is_whitespace() || letter.is_control()) {
            return Err(format!("an image's url must have at most {URL_BYTES_MAX} bytes and no white space"));
        }
        let media_type = told(media_type)?.or_else(|| MediaType::of_url(&url));
        Ok(Self { source: Source::Url(url), media_type, detail: None })
    }

    /// A picture by its bytes, whose form must be the one that `media_type` tells, where it tells one.
    ///
    /// # Errors
    /// What is wrong, and what would be right.
    pub fn of(bytes: Vec<u8>, media_type: &str) -> Result<Self, String> {
        let found = MediaType::of_bytes(&bytes);
        let found = found.ok_or("an image's data must be a PNG, JPEG, GIF or WebP file")?;
        match told(media_type)? {
            Some(told) if told != found => {
                Err(format!("an image's media_type says {}, but its data are {}", told.name(), found.name()))
            }
            _ => Ok(Self { source: Source::Data(ImageBytes(bytes.into())), media_type: Some(found), detail: None }),
        }
    }

    /// Bytes of what is known of it here.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.source {
            Source::Url(url) => url.len(),
            Source::Data(bytes) => bytes.0.len(),
        }
    }
}

fn told(media_type: &str) -> Result<Option<MediaType>, String> {
    if media_type.is_empty() {
        return Ok(None);
    }
    let known = MediaType::parse(media_type).map(Some);
    known.ok_or_else(|| "an image's media_type must be image/png, image/jpeg, image/gif or image/webp".to_owned())
}

impl AsRef<[u8]> for ImageBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// How many they are: what a picture shows is for nobody's logs.
impl fmt::Debug for ImageBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// As bytes, where a form has those: a list of numbers would take half as much again.
impl Serialize for ImageBytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for ImageBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl<'de> Visitor<'de> for Bytes {
            type Value = ImageBytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Self::Value, E> {
                Ok(ImageBytes(bytes.into()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut numbers: A) -> Result<Self::Value, A::Error> {
                let mut bytes = Vec::new();
                while let Some(byte) = numbers.next_element()? {
                    bytes.push(byte);
                }
                Ok(ImageBytes(bytes.into()))
            }
        }
        deserializer.deserialize_bytes(Bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PNG: &[u8] = b"\x89PNG\r\n\x1a\n...";

    #[test]
    fn a_form_is_told_by_how_bytes_begin() {
        let check = |bytes: &[u8], form| assert_eq!(MediaType::of_bytes(bytes), form, "{bytes:?}");
        check(PNG, Some(MediaType::Png));
        check(b"\xff\xd8\xff\xe0JFIF", Some(MediaType::Jpeg));
        check(b"GIF89a..", Some(MediaType::Gif));
        check(b"RIFF\x24\0\0\0WEBPVP8 ", Some(MediaType::Webp));
        check(b"RIFF\x24\0\0\0WAVEfmt ", None);
        check(b"<svg xmlns=", None);
        check(b"", None);
    }

    #[test]
    fn what_is_told_of_bytes_must_be_so() {
        let of = |media_type| Image::of(PNG.to_vec(), media_type).map(|image| image.media_type);
        assert_eq!(of(""), Ok(Some(MediaType::Png)));
        assert_eq!(of("image/PNG"), Ok(Some(MediaType::Png)));
        assert_eq!(
            of("image/jpg"),
            Err("an image's media_type says image/jpeg, but its data are image/png".to_owned())
        );
        assert!(of("image/tiff").is_err() && Image::of(b"%PDF-1.7".to_vec(), "").is_err());
    }

    #[test]
    fn an_address_is_of_the_web_and_may_tell_the_form() {
        let at = |url: &str| Image::at(url.to_owned(), "").map(|image| image.media_type);
        assert_eq!(at("https://example.com/a.b/c.JPG?size=1.png#x"), Ok(Some(MediaType::Jpeg)));
        assert_eq!(at("http://example.com"), Ok(None));
        assert_eq!(at("https://example.com/picture"), Ok(None));
        for bad in
            ["file:///etc/passwd", "data:image/png;base64,AA==", "https://", "https:///a", "gs://a/b", "https://a b/"]
        {
            assert!(at(bad).is_err(), "{bad}");
        }
        assert!(at(&format!("https://a/{}", "x".repeat(URL_BYTES_MAX))).is_err());
    }

    #[test]
    fn nothing_of_a_picture_is_shown() {
        let image = Image::of(PNG.to_vec(), "").unwrap();
        assert!(format!("{image:?}").contains("Data(11 bytes)"));
    }
}
