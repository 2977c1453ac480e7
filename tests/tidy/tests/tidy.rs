//! The rules of `tests_tidy`, on this repository. Each failing test prints every complaint at once.

use tests_tidy::{Repo, acceptance, crates, documents, kernel, licences, promises, results, sources};

fn none(complaints: Vec<String>) {
    assert!(complaints.is_empty(), "\n  {}\n", complaints.join("\n  "));
}

fn repo() -> Repo {
    Repo::open().expect("the repository can be read")
}

#[test]
fn arrows_between_crates() {
    none(crates::arrows(&crates::metadata(&repo().root).unwrap()));
}

#[test]
fn static_programs_hold_no_async_runtime() {
    none(crates::static_trees(&crates::metadata(&repo().root).unwrap()).unwrap());
}

#[test]
fn manifests_use_the_workspace() {
    none(crates::manifests(&repo()).unwrap());
}

#[test]
fn licences_and_bans() {
    none(licences::check(&crates::metadata(&repo().root).unwrap()));
}

#[test]
fn deny_toml_says_the_same() {
    let repo = repo();
    let deny: toml::Table = repo.files["deny.toml"].parse().unwrap();
    let list = |section: &str, key: &str| deny[section][key].as_array().unwrap().clone();
    let allowed: Vec<_> = list("licenses", "allow").iter().map(|v| v.as_str().unwrap().to_owned()).collect();
    assert_eq!(allowed, licences::ALLOWED);
    let banned: Vec<_> =
        list("bans", "deny").iter().map(|v| v["crate"].as_str().unwrap().to_owned()).collect();
    let names: Vec<_> = licences::BANNED.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(banned, names);
}

#[test]
fn acceptance_names_what_exists() {
    let repo = repo();
    println!("{}", acceptance::table(&repo).unwrap());
    none(acceptance::check(&repo).unwrap());
}

#[test]
fn links_in_documents() {
    none(documents::links(&repo()));
}

#[test]
fn no_path_of_one_machine() {
    none(documents::machine_paths(&repo()));
}

#[test]
fn kernel_options_have_reasons() {
    none(kernel::check(&repo()));
}

#[test]
fn files_have_a_shape() {
    none(sources::shape(&repo()));
}

#[test]
fn no_switched_off_tests_and_no_holes() {
    none(sources::words(&repo()));
}

#[test]
fn unsafe_code_is_where_it_may_be() {
    none(sources::unsafe_code(&repo(), sources::UNSAFE_FILES));
}

#[test]
fn pid_one_and_the_sandbox_deny_panics() {
    none(sources::panic_free(&repo()));
}

#[test]
fn readme_says_what_was_measured() {
    none(promises::check(&repo()).unwrap());
}

#[test]
fn results_have_a_form_and_may_be_old() {
    let repo = repo();
    for warning in results::stale(&repo) {
        println!("warning: {warning}");
    }
    none(results::form(&repo));
}
