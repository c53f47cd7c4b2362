//! The API: protobuf messages generated from `proto/`, and their conversion from and to the domain.
//!
//! Everything a caller sends is parsed here, once. Never here: Redis, admission rules.

pub mod error;
pub mod from_pb;
pub mod json;
mod parts;
pub mod to_pb;

/// The messages and services of `genmill.v1`, as generated.
pub mod v1 {
    #![expect(
        clippy::allow_attributes,
        clippy::large_enum_variant,
        clippy::allow_attributes_without_reason,
        clippy::use_self,
        unused_qualifications,
        reason = "generated code"
    )]
    tonic::include_proto!("genmill.v1");
}

/// The encoded `FileDescriptorSet` of `proto/`, for reflection and for JSON.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The largest message a server takes or sends, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;
