//! Which files does a page need besides itself?
//!
//! They are part of the binary. Each is served below a name that contains its hash, so that a browser may keep
//! it for ever and never uses an old one.

use axum::extract::Path;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use std::sync::LazyLock;

pub struct Asset {
    name: &'static str,
    media_type: &'static str,
    content: &'static [u8],
    pub url: String,
}

pub static STYLE: LazyLock<Asset> = LazyLock::new(|| {
    Asset::new("console.css", "text/css; charset=utf-8", include_bytes!("../../assets/console.css"))
});
pub static SCRIPT: LazyLock<Asset> = LazyLock::new(|| {
    Asset::new("console.js", "text/javascript; charset=utf-8", include_bytes!("../../assets/console.js"))
});
pub static ICON: LazyLock<Asset> =
    LazyLock::new(|| Asset::new("icon.svg", "image/svg+xml", include_bytes!("../../assets/icon.svg")));

impl Asset {
    fn new(name: &'static str, media_type: &'static str, content: &'static [u8]) -> Self {
        let hash: String = hex::encode(Sha256::digest(content)).chars().take(16).collect();
        Self { name, media_type, content, url: format!("/assets/{hash}/{name}") }
    }
}

pub async fn serve(Path((hash, name)): Path<(String, String)>) -> Response {
    let url = format!("/assets/{hash}/{name}");
    match [&*STYLE, &*SCRIPT, &*ICON].into_iter().find(|asset| asset.name == name && asset.url == url) {
        Some(asset) => {
            let headers = [
                (header::CONTENT_TYPE, asset.media_type),
                (header::CACHE_CONTROL, "public, max-age=31536000, immutable"),
            ];
            (headers, asset.content).into_response()
        }
        None => StatusCode::NOT_FOUND.into_response(),
    }
}
