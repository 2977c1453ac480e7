//! One model of each kind: for embedding, for chat, and a copy that was cut off.

use agentd_domain::api::Model;
use agentd_domain::engine::ModelKind;
use agentd_domain::fault::Report;

pub(super) fn embedder() -> Model {
    Model {
        name: "all-minilm-l6-v2".into(),
        file: "all-minilm-l6-v2.q8_0.gguf".into(),
        bytes: 24_894_336,
        origin: "image".into(),
        architecture: "bert".into(),
        kind: ModelKind::Embedding,
        loaded: true,
        loading: false,
        default: false,
        pinned: true,
        uses: 0,
        idle_ms: Some(61_000),
        last_used_unix_ms: None,
        load_ms: Some(120),
        held_bytes: Some(40 << 20),
        problem: None,
    }
}

pub(super) fn chat_model() -> Model {
    Model {
        name: "tiny".into(),
        file: "tiny.gguf".into(),
        bytes: 1_310_720,
        origin: "image".into(),
        architecture: "llama".into(),
        kind: ModelKind::Chat,
        loaded: true,
        loading: false,
        default: true,
        pinned: false,
        uses: 2,
        idle_ms: None,
        last_used_unix_ms: Some(1_795_176_243_000),
        load_ms: Some(80),
        held_bytes: Some(10 << 20),
        problem: None,
    }
}

pub(super) fn cut_model() -> Model {
    let problem = Report::caller(
        "model_file_truncated",
        "the model was not loaded",
        "the file ends 1.1 GiB before its last tensor does",
        "upload it again",
    );
    Model {
        name: "half-model".into(),
        file: "half-model.gguf".into(),
        bytes: 1_200_000_000,
        origin: "data".into(),
        loaded: false,
        default: false,
        uses: 0,
        last_used_unix_ms: None,
        load_ms: None,
        held_bytes: None,
        problem: Some(problem),
        ..chat_model()
    }
}
