//! Who a node is: one Ed25519 key. Peers pin the SHA-256 of its public half, so a certificate is
//! only the envelope that TLS wants; it is signed anew at each start and never stored.

mod pinned;

use std::fmt;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use ring::{digest, hmac};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};

use crate::trust::Trust;
use pinned::PinnedKeys;

/// A node's public name for itself: SHA-256 of the SubjectPublicKeyInfo of its certificate.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeKey([u8; 32]);

impl NodeKey {
    /// The key of a SubjectPublicKeyInfo in DER.
    pub(crate) fn of_spki(spki: &[u8]) -> Self {
        let mut key = [0; 32];
        key.copy_from_slice(digest::digest(&digest::SHA256, spki).as_ref());
        Self(key)
    }

    /// The key in a certificate, or `None` when it is not one.
    pub(crate) fn of_certificate(certificate: &CertificateDer<'_>) -> Option<Self> {
        let parsed = rustls::server::ParsedCertificate::try_from(certificate).ok()?;
        Some(Self::of_spki(&parsed.subject_public_key_info()))
    }
}

impl fmt::Display for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeKey({self})")
    }
}

impl FromStr for NodeKey {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let nibble = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        let bad = || IdentityError::BadKey(text.chars().take(80).collect());
        let mut key = [0; 32];
        if text.len() != 64 {
            return Err(bad());
        }
        for (byte, digits) in key.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let (high, low) = nibble(digits[0]).zip(nibble(digits[1])).ok_or_else(bad)?;
            *byte = high << 4 | low;
        }
        Ok(Self(key))
    }
}

impl TryFrom<String> for NodeKey {
    type Error = IdentityError;

    fn try_from(text: String) -> Result<Self, IdentityError> {
        text.parse()
    }
}

impl From<NodeKey> for String {
    fn from(key: NodeKey) -> Self {
        key.to_string()
    }
}

/// A node's private key and the certificate that shows its public half.
pub struct Identity {
    node: String,
    pair: rcgen::KeyPair,
    certificate: CertificateDer<'static>,
    key: NodeKey,
}

impl Identity {
    /// Makes a new key for the node called `node`.
    ///
    /// # Errors
    /// [`IdentityError::Make`] when the system has no randomness or the name cannot be in a certificate.
    pub fn generate(node: &str) -> Result<Self, IdentityError> {
        Self::of_pair(node, rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519)?)
    }

    /// Reads a key that [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// [`IdentityError`] says which file, and whether it is missing, open to others, or not a key.
    pub fn load(path: &Path) -> Result<Self, IdentityError> {
        let read = |source| IdentityError::Read {
            path: path.to_owned(),
            source,
        };
        let mode = std::fs::metadata(path).map_err(read)?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(IdentityError::Open {
                path: path.to_owned(),
                mode: mode & 0o777,
            });
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        let damaged = || IdentityError::Damaged {
            path: path.to_owned(),
        };
        let node = text
            .lines()
            .find_map(|line| line.strip_prefix(NODE_LINE))
            .ok_or_else(damaged)?;
        let pem = text
            .find("-----BEGIN")
            .map(|start| &text[start..])
            .ok_or_else(damaged)?;
        let pair = rcgen::KeyPair::from_pem_and_sign_algo(pem, &rcgen::PKCS_ED25519)
            .map_err(|_| damaged())?;
        Self::of_pair(node.trim(), pair)
    }

    /// The key in this file; where there is no such file, a new one for the node called `node`, saved there.
    ///
    /// # Errors
    /// Those of [`load`](Self::load), [`generate`](Self::generate) and [`save`](Self::save).
    pub fn load_or_generate(path: &Path, node: &str) -> Result<Self, IdentityError> {
        if path.exists() {
            return Self::load(path);
        }
        let made = Self::generate(node)?;
        made.save(path)?;
        Ok(made)
    }

    /// Writes the key as PEM, readable by its owner only. An existing file is never overwritten:
    /// a lost key would lock the node out of its cluster.
    ///
    /// # Errors
    /// [`IdentityError::Write`] with the path.
    pub fn save(&self, path: &Path) -> Result<(), IdentityError> {
        let write = |source| IdentityError::Write {
            path: path.to_owned(),
            source,
        };
        let mut options = std::fs::OpenOptions::new();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(write)?;
        let text = format!("{NODE_LINE} {}\n{}", self.node, self.pair.serialize_pem());
        file.write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(write)
    }

    /// The public name of this key: what peers pin.
    pub fn key(&self) -> NodeKey {
        self.key
    }

    /// The node that this key was made for.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// A TLS 1.3 client for any QUIC endpoint: it shows this key and accepts only keys in `trust`.
    ///
    /// # Errors
    /// [`IdentityError::Tls`] when TLS refuses the certificate.
    pub fn client_config(
        &self,
        trust: &Trust,
        alpn: &[u8],
    ) -> Result<rustls::ClientConfig, IdentityError> {
        let pinned = Arc::new(PinnedKeys::new(trust));
        let mut config = rustls::ClientConfig::builder_with_provider(pinned.provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(pinned)
            .with_client_auth_cert(vec![self.certificate.clone()], self.private_key())?;
        config.alpn_protocols = vec![alpn.to_vec()];
        // Names say nothing here, and a resumed session would skip the look at the key.
        config.enable_sni = false;
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }

    /// A TLS 1.3 server for any QUIC endpoint: it shows this key and demands one that is in `trust`.
    ///
    /// # Errors
    /// [`IdentityError::Tls`] when TLS refuses the certificate.
    pub fn server_config(
        &self,
        trust: &Trust,
        alpn: &[u8],
    ) -> Result<rustls::ServerConfig, IdentityError> {
        let pinned = Arc::new(PinnedKeys::new(trust));
        let mut config = rustls::ServerConfig::builder_with_provider(pinned.provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(pinned)
            .with_single_cert(vec![self.certificate.clone()], self.private_key())?;
        config.alpn_protocols = vec![alpn.to_vec()];
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// A secret that only this key's owner can make, the same at every start.
    pub(crate) fn derive(&self, purpose: &str) -> [u8; 32] {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.pair.serialize_der());
        let mut secret = [0; 32];
        secret.copy_from_slice(hmac::sign(&key, purpose.as_bytes()).as_ref());
        secret
    }

    fn of_pair(node: &str, pair: rcgen::KeyPair) -> Result<Self, IdentityError> {
        let mut params = rcgen::CertificateParams::new(Vec::new())?;
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, node);
        let certificate = params.self_signed(&pair)?.der().clone();
        let key =
            NodeKey::of_certificate(&certificate).ok_or(rcgen::Error::CouldNotParseCertificate)?;
        Ok(Self {
            node: node.to_owned(),
            pair,
            certificate,
            key,
        })
    }

    fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.pair.serialize_der()).into()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({} {})", self.node, self.key)
    }
}

/// Why there is no identity. Each says what the operator should look at.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file cannot be read.
    #[error("cannot read the key file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file cannot be written; it may exist already.
    #[error("cannot write the key file {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others may read the private key.
    #[error("the key file {path} has mode {mode:03o}: others can read it; set it to 600")]
    Open {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file is not one that this crate wrote.
    #[error("the key file {path} holds no Ed25519 key with a node's name")]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// A key that is not 64 lower-case hexadecimal digits.
    #[error("{0:?} is no node key: it has 64 digits, 0 to 9 and a to f")]
    BadKey(String),
    /// The key or its certificate could not be made.
    #[error("cannot make a key")]
    Make(#[from] rcgen::Error),
    /// TLS refused what it was given.
    #[error("TLS refuses this identity")]
    Tls(#[from] rustls::Error),
}

/// Stands before the key in its file: the name is not secret, and an operator may read it.
const NODE_LINE: &str = "node:";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_identity_is_the_same_and_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.key");
        let made = Identity::generate("node-1").unwrap();
        made.save(&path).unwrap();
        let read = Identity::load(&path).unwrap();
        assert_eq!((read.key(), read.node()), (made.key(), "node-1"));
        assert_eq!(read.derive("x"), made.derive("x"));
        assert_ne!(read.derive("x"), made.derive("y"));
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(made.save(&path), Err(IdentityError::Write { .. })));
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.key");
        Identity::generate("node-1").unwrap().save(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(
            Identity::load(&path),
            Err(IdentityError::Open { mode: 0o644, .. })
        ));
    }

    #[test]
    fn a_damaged_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.key");
        std::fs::write(&path, "node: a\n-----BEGIN PRIVATE KEY-----\nAAAA\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(matches!(
            Identity::load(&path),
            Err(IdentityError::Damaged { .. })
        ));
    }

    #[test]
    fn a_key_survives_being_written() {
        let key = Identity::generate("node-1").unwrap().key();
        assert_eq!(key.to_string().parse::<NodeKey>().unwrap(), key);
        assert!(key.to_string()[1..].parse::<NodeKey>().is_err());
        assert!("G".repeat(64).parse::<NodeKey>().is_err());
        assert!("é".repeat(32).parse::<NodeKey>().is_err());
    }
}
