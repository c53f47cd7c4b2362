//! Short ways to write what a message says. Never here: what it may say, which the server checks.

use crate::v1::{ContentPart, Image, content_part, image};

impl ContentPart {
    /// Text.
    #[must_use]
    pub fn text(text: impl Into<String>) -> Self {
        Self { part: Some(content_part::Part::Text(text.into())) }
    }

    /// The picture at an address, from which the provider fetches it.
    #[must_use]
    pub fn image_url(url: impl Into<String>) -> Self {
        Self::of(Image::from(image::Source::Url(url.into())))
    }

    /// A picture by its bytes: PNG, JPEG, GIF or WebP.
    #[must_use]
    pub fn image(data: impl Into<Vec<u8>>) -> Self {
        Self::of(Image::from(image::Source::Data(data.into())))
    }

    /// A picture.
    #[must_use]
    pub const fn of(image: Image) -> Self {
        Self { part: Some(content_part::Part::Image(image)) }
    }
}

/// A picture whose form its bytes or its address tell.
impl From<image::Source> for Image {
    fn from(source: image::Source) -> Self {
        Self { source: Some(source), ..Self::default() }
    }
}
