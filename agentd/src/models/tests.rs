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

#[tokio::test]
async fn a_pin_is_on_disk_before_it_holds_and_outlives_agentd() {
    use crate::store::{Db, Store};
    use agentd_console::Residence;
    use std::os::unix::fs::FileExt;

    let scene = Scene::new();
    let file = fs::File::create(scene.folder.path().join("data/models/mine.gguf")).expect("a file");
    file.write_all_at(&crate::gpu::tests::header_of(1), 0).expect("written");
    file.set_len(4096 + (1 << 20)).expect("as long as it says");
    fs::write(scene.folder.path().join("data/models/other.gguf"), "x").expect("written");
    let (mine, nobody) = ("mine".parse().expect("a name"), "nobody".parse().expect("a name"));
    let error = scene.models.pin(&mine, Residence::Pinned).await.expect_err("no store yet");
    assert_eq!(error.code, "store_unusable");
    let db = || Db::new(Store::open(&scene.folder.path().join("system.redb")).expect("opens"));
    let board = crate::health::Board::default();
    scene.models.open(db(), BTreeSet::from(["boss".to_owned()]), &board).await;
    let error = scene.models.pin(&nobody, Residence::Pinned).await.expect_err("there is none");
    assert_eq!(error.code, "not_found");
    assert!(scene.models.pin(&mine, Residence::Pinned).await.expect("pinned").pinned);
    let wanted = |models: &Models| {
        let named: Vec<Named> = models.scan().into_iter().map(|(named, _)| named).collect();
        plan::wanted(&named, &models.pinned()).pinned
    };
    assert_eq!(wanted(&scene.models), BTreeSet::from(["mine".to_owned()]), "what is configured is not there");
    assert_eq!(scene.models.pinned(), ["boss", "mine"].map(str::to_owned).into());
    // What an agentd that was started again has.
    scene.models.0.pins.lock().expect("unpoisoned").forget();
    assert!(scene.models.pinned().is_empty());
    scene.models.open(db(), BTreeSet::new(), &board).await;
    assert_eq!(wanted(&scene.models), BTreeSet::from(["mine".to_owned()]));
    // It is the name's: the file may go and come back.
    scene.models.remove(mine.clone()).await.expect("removed");
    assert!(wanted(&scene.models).is_empty() && scene.models.pinned().contains("mine"));
    let error = scene.models.pin(&mine, Residence::OnDemand).await.expect_err("there is nothing to show");
    assert!(error.why.contains("taken away") && !scene.models.pinned().contains("mine"), "{error}");
}
