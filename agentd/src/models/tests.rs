use super::*;
use crate::engine;
use agentd_sandbox::client::Launcher;
use bytes::Bytes;
use futures::stream;

struct Scene {
    folder: tempfile::TempDir,
    models: Models,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let places = Places::below(folder.path());
        fs::create_dir_all(places.models()).expect("made");
        fs::create_dir_all(&places.builtin_models).expect("made");
        let engine = engine::start(
            engine::Links {
                launcher: Launcher::at(folder.path().join("none")),
                sockets: folder.path().to_owned(),
                memory_max_bytes: 1,
                load_patience: std::time::Duration::from_secs(2),
                gate: crate::engine::testing::open_gate(),
            },
            std::future::ready(()),
        );
        Self { models: Models::new(&places, engine), folder }
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path().join("data/models")).expect("read");
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
    }

    async fn add(&self, upload: Upload) -> Report {
        self.models.add("mine".parse().expect("a name"), upload).await.expect_err("refused")
    }
}

fn upload(length_bytes: Option<u64>, pieces: Vec<io::Result<&'static [u8]>>) -> Upload {
    let pieces = pieces.into_iter().map(|piece| piece.map(Bytes::from_static));
    Upload { length_bytes, pieces: Box::pin(stream::iter(pieces.collect::<Vec<_>>())) }
}

#[tokio::test]
async fn what_is_no_whole_model_is_refused_and_leaves_nothing() {
    let scene = Scene::new();
    let gone = || Err(io::ErrorKind::ConnectionReset.into());
    let cases = [
        (upload(None, vec![Ok(b"nonsense")]), "model_not_gguf"),
        (upload(None, vec![Ok(b"GGUF\x03\0\0\0")]), "model_file_truncated"),
        (upload(None, vec![Ok(b"GGUF"), gone()]), "upload_incomplete"),
        (upload(Some(9), vec![Ok(b"GGUF")]), "upload_incomplete"),
        (upload(Some(u64::MAX), vec![]), "disk_full"),
    ];
    for (upload, code) in cases {
        assert_eq!(scene.add(upload).await.code, code);
        assert_eq!(scene.files(), Vec::<String>::new(), "{code}");
    }
}

#[tokio::test]
async fn what_a_broken_upload_left_is_swept_away() {
    let scene = Scene::new();
    fs::write(scene.folder.path().join("data/models/old.gguf.part"), "x").expect("written");
    scene.models.refresh().await;
    assert_eq!(scene.files(), Vec::<String>::new());
}

#[tokio::test]
async fn a_bad_file_is_listed_with_its_problem_and_can_be_removed() {
    let scene = Scene::new();
    fs::write(scene.folder.path().join("data/models/bad.gguf"), "x").expect("written");
    let listed = scene.models.list().await;
    let codes: Vec<_> =
        listed.iter().filter_map(|model| Some(model.problem.as_ref()?.code.as_str())).collect();
    assert_eq!(codes, ["model_not_gguf"]);
    scene.models.remove("bad".parse().expect("a name")).await.expect("removed");
    assert!(scene.models.list().await.is_empty());
    let error = scene.models.remove("bad".parse().expect("a name")).await.expect_err("gone");
    assert_eq!(error.code, "not_found");
}

#[tokio::test]
async fn the_images_models_stay() {
    let scene = Scene::new();
    fs::write(scene.folder.path().join("usr/share/agentd/models/tiny.gguf"), "x").expect("written");
    let error = scene.models.remove("tiny".parse().expect("a name")).await.expect_err("refused");
    assert_eq!(error.code, "conflict");
    let error =
        scene.models.add("tiny".parse().expect("a name"), upload(None, vec![])).await.expect_err("refused");
    assert_eq!(error.code, "conflict");
}
