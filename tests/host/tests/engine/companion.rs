//! What does a real chat model make of what echo remembers?
//!
//! Ten facts told and asked for, with the prompts that echo writes, three times: right after telling; in a new
//! conversation; and in a new conversation without the memory, as the control.

use crate::client::{Client, Engine};
use agentd_domain::engine::{ChatMessage, Generate, ModelKind, Prompt, Sampling};
use echo_agent::agentd::{Hit, Message, Turn};
use echo_agent::mind;
use std::path::Path;

/// The fact, the question, and a word that only the fact has.
const FACTS: [(&str, &str, &str); 10] = [
    ("My sister Ana moved to Porto last spring.", "In which city does my sister Ana live now?", "Porto"),
    ("I am allergic to peanuts, so I always carry an injector.", "What am I allergic to?", "peanut"),
    ("Our dog Bruno is nine years old and hates thunder.", "How old is our dog?", "nine"),
    ("The spare key is under the blue flowerpot.", "Where is the spare key?", "flowerpot"),
    ("My boss is called Ingrid Solberg.", "What is the name of my boss?", "Ingrid"),
    ("I take the 7:40 train to work on Mondays.", "Which train do I take on Mondays?", "7:40"),
    ("Our wedding was on the fourth of May in Verona.", "Where did we get married?", "Verona"),
    ("I drive a green Volvo that needs new brakes.", "Which car do I drive?", "Volvo"),
    ("Grandmother's soup needs fennel and a little saffron.", "What does grandmother's soup need?", "fennel"),
    ("My son Leo plays the trumpet in the town band.", "Which instrument does my son play?", "trumpet"),
];
/// Of ten. SmolLM2 with 135 million weights, the smallest chat model there is, had 6 and 6, and 0 without memory.
const WITH_MEMORY_LEAST: usize = 5;
const WITHOUT_MEMORY_MOST: usize = 1;
const WORDS: u32 = 40;
const NOW_UNIX_MS: i64 = 1_795_000_000_000;

#[test]
fn a_chat_model_answers_from_memory() {
    let Some(model) = std::env::var_os("AGENTD_CHAT_MODEL") else {
        println!("SKIP: a real chat model is fetched in the long run only");
        return;
    };
    let Some(engine) = Engine::start() else { return };
    let mut client = engine.connect();
    client.load("chat", Path::new(&model), ModelKind::Chat).expect("the model loads");
    let (mut at_once, mut later, mut without) = (0, 0, 0);
    for (number, (fact, question, word)) in FACTS.into_iter().enumerate() {
        let mut say = |text: &str, history: &[Turn], recalled: &[Hit]| {
            say(&mut client, number as u32, text, history, recalled)
        };
        let memory =
            [Hit { id: "1".to_owned(), text: fact.to_owned(), event_unix_ms: NOW_UNIX_MS, score: 1.0 }];
        let turn = |role: &str, content: &str| Turn { role: role.to_owned(), content: content.to_owned() };
        let first = say(fact, &[], &[]);
        let history = [turn("user", fact), turn("assistant", &first)];
        let mut right = |history: &[Turn], recalled: &[Hit]| {
            let said = say(question, history, recalled);
            println!("{question} {said:?}");
            usize::from(said.contains(word))
        };
        at_once += right(&history, &memory);
        later += right(&[], &memory);
        without += right(&[], &[]);
    }
    let name = Path::new(&model).file_stem().unwrap_or_default().to_string_lossy();
    println!(
        "RESULT: {name}, right words of ten: {at_once} right after telling, {later} in a new conversation, {without} \
         without memory"
    );
    assert!(at_once.min(later) >= WITH_MEMORY_LEAST && without <= WITHOUT_MEMORY_MOST);
}

/// One turn, with a seed of its own so that a run can be repeated.
fn say(client: &mut Client, seed: u32, text: &str, history: &[Turn], recalled: &[Hit]) -> String {
    let message = Message {
        id: "m".to_owned(),
        text: text.to_owned(),
        sent_unix_ms: NOW_UNIX_MS,
        history: history.to_vec(),
    };
    let prompt = mind::Prompt { message: &message, recalled, history: true, now_unix_ms: NOW_UNIX_MS };
    let messages: Vec<ChatMessage> = prompt
        .messages()
        .into_iter()
        .map(|message| serde_json::from_value(message).expect("a chat message"))
        .collect();
    let key = format!("{text}-{}-{}", history.len(), recalled.len());
    let sampling =
        Sampling { temperature: echo_agent::agentd::TEMPERATURE, seed: Some(seed), ..Sampling::default() };
    let prompt = Prompt::Messages(messages);
    let model = "chat".to_owned();
    client
        .generate(Generate {
            model,
            key,
            prompt,
            sampling,
            max_tokens: WORDS,
            stop: Vec::new(),
            share: Default::default(),
            shape: Default::default(),
        })
        .text
}
