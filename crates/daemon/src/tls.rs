//! Picks the cryptography of all TLS connections.

/// Makes `ring` the provider for the whole process. To be called before the first TLS client is built; a second call
/// changes nothing.
pub fn install() {
    // An error means that a provider is installed already, which is all that is wanted.
    drop(rustls::crypto::ring::default_provider().install_default());
}
