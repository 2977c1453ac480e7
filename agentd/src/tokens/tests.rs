use super::*;
use crate::store::Store;
use agentd_domain::ids::AgentName;
use uuid::Uuid;

struct Scene {
    _folder: tempfile::TempDir,
    db: Db,
    tokens: Tokens,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let db = Db::new(Store::open(&folder.path().join("system.redb")).expect("opens"));
        let tokens = Self::opened(&db);
        Self { _folder: folder, db, tokens }
    }

    fn opened(db: &Db) -> Tokens {
        Tokens::open(RootKey::from_secret(&[7; 32]).expect("a key"), db.clone()).expect("opened")
    }

    fn agent(&self, number: u128, rest: &str) -> AgentRow {
        let name: AgentName = format!("a{number}").parse().expect("a name");
        let row = AgentRow {
            v: 1,
            agent_id: AgentId(Uuid::from_u128(number)),
            owner_id: self.db.owner(),
            manifest: format!("[agent]\nname = \"{name}\"\nexec = [\"/agent/run\"]\n{rest}"),
            name,
            version: "1".to_owned(),
            digest: String::new(),
            uid: self.db.here().next_uid().expect("a uid"),
            wanted: true,
            bundled: false,
            restarts: 0,
            installed_unix_ms: 5,
            parent: None,
            arguments: Vec::new(),
        };
        self.db.here().add_agent(&row).expect("added");
        row
    }
}

const MODEL: &str = "[model]\nuse = \"default\"\n";

#[tokio::test]
async fn an_agent_of_an_older_version_gets_a_token_and_keeps_it() {
    let scene = Scene::new();
    let row = scene.agent(1, MODEL);
    assert_eq!(scene.tokens.of(row.agent_id).await.expect_err("none").code, "token_missing");
    scene.tokens.settle().expect("settled");
    let held = scene.tokens.of(row.agent_id).await.expect("verified");
    assert!(held.rights.api.contains("models"));
    let text = scene.tokens.text_of(row.agent_id).await.expect("there");
    scene.tokens.settle().expect("settled");
    assert_eq!(scene.tokens.text_of(row.agent_id).await.expect("there"), text, "once is enough");
}

#[tokio::test]
async fn an_update_of_the_manifest_renews_the_token_and_not_what_the_owner_narrowed() {
    let scene = Scene::new();
    let (row, narrowed) = (scene.agent(1, ""), scene.agent(2, MODEL));
    scene.tokens.settle().expect("settled");
    let by = Narrowing { api: Some(Default::default()), ..Narrowing::default() };
    let manifest = parse_manifest(&narrowed.manifest).expect("a manifest");
    let token = scene.tokens.minted(narrowed.agent_id, &manifest, &by).expect("minted");
    scene.tokens.replace(&narrowed, token).await.expect("replaced");
    for row in [&row, &narrowed] {
        let manifest = format!("{}{}", scene.agent(row.agent_id.0.as_u128() + 10, "").manifest, MODEL);
        scene.db.here().change_agent(row.agent_id, |row| row.manifest = manifest).expect("changed");
    }
    scene.tokens.settle().expect("settled");
    assert!(scene.tokens.of(row.agent_id).await.expect("verified").rights.api.contains("models"));
    assert!(scene.tokens.of(narrowed.agent_id).await.expect("verified").rights.api.is_empty());
}

#[tokio::test]
async fn what_is_revoked_stays_revoked_and_ends_its_descendants() {
    let scene = Scene::new();
    let (parent, child) = (scene.agent(1, MODEL), scene.agent(2, MODEL));
    scene.tokens.settle().expect("settled");
    let text = scene.tokens.text_of(parent.agent_id).await.expect("there");
    let handed = scene.tokens.handed_on(&text, child.agent_id, &Narrowing::default()).expect("made");
    let held = scene.tokens.verify(&handed.token, child.agent_id).expect("the child's");
    let call = Request::Api("models".to_owned());
    assert_eq!(scene.tokens.may(&held, &call), Ok(true));

    let id = scene.tokens.says(parent.agent_id).await.expect("read").revocation_ids.remove(0);
    let first = scene.tokens.revoke(id.clone(), "owner", "a test").await.expect("revoked");
    let again = scene.tokens.revoke(id, "owner", "once more").await.expect("revoked");
    assert_eq!(again, first, "who was first, when and why stays");
    for result in [
        scene.tokens.may(&held, &call).map(drop),
        scene.tokens.verify(&handed.token, child.agent_id).map(drop),
        scene.tokens.of(parent.agent_id).await.map(drop),
        // After a restart too.
        Scene::opened(&scene.db).may(&held, &call).map(drop),
    ] {
        assert_eq!(result.expect_err("denied").code, "token_revoked");
    }
    // A new token for the parent does not revive the child's.
    let manifest = parse_manifest(&parent.manifest).expect("a manifest");
    let token = scene.tokens.minted(parent.agent_id, &manifest, &Narrowing::default()).expect("minted");
    scene.tokens.replace(&parent, token).await.expect("replaced");
    scene.tokens.of(parent.agent_id).await.expect("holds again");
    assert!(scene.tokens.may(&held, &call).is_err());
}

#[tokio::test]
async fn a_token_that_was_replaced_ends() {
    let scene = Scene::new();
    let row = scene.agent(1, MODEL);
    scene.tokens.settle().expect("settled");
    let held = scene.tokens.of(row.agent_id).await.expect("verified");
    let manifest = parse_manifest(&row.manifest).expect("a manifest");
    let token = scene.tokens.minted(row.agent_id, &manifest, &Narrowing::default()).expect("minted");
    scene.tokens.replace(&row, token).await.expect("replaced");
    assert_eq!(scene.tokens.in_force(&held).expect_err("ended").code, "token_revoked");
    let list = scene.db.here().revoked().expect("read");
    assert_eq!((list.len(), list[0].by.as_str()), (1, "appliance"));
}

#[tokio::test]
async fn tokens_of_a_lost_key_and_of_other_agents_give_nothing() {
    let scene = Scene::new();
    let (one, two) = (scene.agent(1, MODEL), scene.agent(2, MODEL));
    scene.tokens.settle().expect("settled");
    let text = scene.tokens.text_of(one.agent_id).await.expect("there");
    assert_eq!(scene.tokens.verify(&text, two.agent_id).expect_err("refused").code, "token_stolen");
    let key = RootKey::from_secret(&[8; 32]).expect("a key");
    let other = Tokens::open(key, scene.db.clone()).expect("opened");
    other.settle().expect("what is not ours is not renewed in silence");
    assert_eq!(other.of(one.agent_id).await.expect_err("refused").code, "token_foreign");
}

#[test]
fn nothing_is_nothing() {
    let scene = Scene::new();
    let held = nothing(AgentId(Uuid::from_u128(1)));
    assert_eq!(scene.tokens.in_force(&held).expect_err("over").code, "token_expired");
}
