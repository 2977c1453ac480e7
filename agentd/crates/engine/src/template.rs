//! How do chat messages become the text that a model was trained on?
//!
//! The model's file carries a Jinja template, written for Python's Jinja2 as `transformers` sets it up. It is
//! rendered by `minijinja` with Python's methods added, with a bound on work: a template is code from a stranger.
//! A file without a template, or with one that does not compile, gets ChatML; [`Template::origin`] says so.
//!
//! True: what a message says cannot become a control token. Control tokens' texts (`<|im_end|>`) inside a
//! message are replaced by marks before the template sees them, and come back afterwards as [`Segment::Plain`],
//! which is tokenised as ordinary text.
//! Checked by hand: of the 70 templates that llama.cpp's tests carry (in the package llama-cpp-python 0.3.36) each
//! renders here, and as Python's Jinja2 3 does where that one can.
//! Source: `transformers.utils.chat_template_utils` (block trimming, `raise_exception`, `strftime_now`, `tojson`).

use agentd_domain::engine::ChatMessage;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde::Serialize;

/// ChatML, which most models without a template of their own were trained on or tolerate.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] \
    + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Steps of the template engine. A template of 20 kB over a hundred messages takes about 100,000.
const FUEL: u64 = 5_000_000;
/// Nested calls of macros and loops.
const RECURSION: usize = 64;
/// Stands around the number of a replaced text. A private-use character; where a message holds it, it is
/// replaced too, so a message cannot fake a mark.
const MARK: char = '\u{10FFFD}';
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TemplateError {
    #[error("`{0}` is not a role; roles are system, developer, user, assistant and tool")]
    Role(String),
    #[error("the model's chat template refused the messages: {0}")]
    Refused(String),
}

/// A part of the rendered prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Segment {
    /// Control tokens' texts in it are control tokens.
    Markup(String),
    /// Ordinary text whatever it looks like.
    Plain(String),
}

#[derive(Debug)]
pub(crate) struct Template {
    source: String,
    /// `file`, `chatml`, or `chatml` with the reason why the file's own was not taken.
    pub(crate) origin: String,
    bos: String,
    eos: String,
}

impl Template {
    /// `bos` and `eos` are the texts of the tokens that templates call `bos_token` and `eos_token`.
    pub(crate) fn new(of_file: Option<&str>, bos: String, eos: String) -> Self {
        let of_file = of_file.map(without_generation_tags);
        let compiled = of_file.as_deref().map(|source| environment(0).template_from_str(source).map(drop));
        let (source, origin) = match (of_file, compiled) {
            (Some(source), Some(Ok(()))) => (source, "file".to_owned()),
            (_, Some(Err(error))) => {
                (CHATML.to_owned(), format!("chatml: the file's template does not compile: {error}"))
            }
            (_, None) | (None, _) => (CHATML.to_owned(), "chatml".to_owned()),
        };
        Self { source, origin, bos, eos }
    }

    /// The prompt up to where the assistant's answer begins. `unix_seconds` is what `strftime_now` formats.
    pub(crate) fn render(
        &self,
        messages: &[ChatMessage],
        controls: &[String],
        unix_seconds: i64,
    ) -> Result<Vec<Segment>, TemplateError> {
        if let Some(message) = messages.iter().find(|m| !ROLES.contains(&m.role.as_str())) {
            return Err(TemplateError::Role(message.role.clone()));
        }
        let mut replaced = Vec::new();
        let shielded: Vec<Value> = messages
            .iter()
            .map(|message| {
                let content = shield(&message.content, controls, &mut replaced);
                Value::from_pairs([("role", message.role.clone()), ("content", content)])
            })
            .collect();
        let environment = environment(unix_seconds);
        let rendered = environment
            .template_from_str(&self.source)
            .and_then(|template| {
                template.render(context! {
                    messages => shielded,
                    add_generation_prompt => true,
                    bos_token => self.bos.as_str(),
                    eos_token => self.eos.as_str(),
                    tools => Value::from(()),
                    documents => Value::from(()),
                })
            })
            .map_err(|error| TemplateError::Refused(reason(&error)))?;
        Ok(segments(&rendered, &replaced))
    }
}

/// Replaces `{% generation %}` and its end, with which `transformers` marks what the assistant said, by a condition
/// that holds: it writes nothing, and the trimming of space around the tags stays as it is.
fn without_generation_tags(source: &str) -> String {
    let mut replaced = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        replaced.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (inside, after) = tag.split_at(end);
        let name = inside.trim_matches(['-', '+', ' ', '\t', '\n']);
        replaced.push_str(&match name {
            "generation" => inside.replace(name, "if true"),
            "endgeneration" => inside.replace(name, "endif"),
            _ => inside.to_owned(),
        });
        rest = after;
    }
    replaced.push_str(rest);
    replaced
}

/// The message of a template error, without the source excerpt.
fn reason(error: &Error) -> String {
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    detail.chars().take(300).collect()
}

fn environment(unix_seconds: i64) -> Environment<'static> {
    let mut environment = Environment::new();
    // Both are constants of the syntax, which cannot conflict with its other parts.
    if let Ok(syntax) = environment.syntax().to_builder().trim_blocks(true).lstrip_blocks(true).build() {
        environment.set_syntax(syntax);
    }
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", move |format: String| -> Result<String, Error> {
        let invalid = |error: jiff::Error| Error::new(ErrorKind::InvalidOperation, error.to_string());
        let now = jiff::Timestamp::from_second(unix_seconds).map_err(invalid)?;
        jiff::fmt::strtime::format(&format, now).map_err(invalid)
    });
    environment.add_filter("tojson", to_json);
    // As in Python: `none` is not; templates ask `tools is iterable` before they count.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment
}

/// As Python's `json.dumps(value, ensure_ascii=False, indent=...)`: separators with a space, nothing escaped for
/// HTML. The engine's own filter escapes `<`, which models never saw.
fn to_json(value: Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Accepted and without effect here, as in Python for text that is already Unicode and ordered.
    let _: Option<bool> = options.get("ensure_ascii")?;
    let _: Option<bool> = options.get("sort_keys")?;
    let _: Option<Value> = options.get("separators")?;
    options.assert_all_used()?;
    let mut json = Vec::new();
    let spaces = " ".repeat(indent.unwrap_or(0).min(16));
    let written = match indent {
        Some(_) => {
            let pretty = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, pretty))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, Spaced)),
    };
    written.map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    String::from_utf8(json).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// `{"a": 1, "b": 2}`, as Python writes it.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

/// Replaces every control token's text, the longest first, and every mark.
fn shield(content: &str, controls: &[String], replaced: &mut Vec<String>) -> String {
    let mut shielded = String::with_capacity(content.len());
    let mut rest = content;
    while let Some(first) = rest.chars().next() {
        let control = controls
            .iter()
            .filter(|control| !control.is_empty() && rest.starts_with(control.as_str()))
            .max_by_key(|control| control.len());
        let taken = match control {
            Some(control) => control.len(),
            None if first == MARK => MARK.len_utf8(),
            None => {
                shielded.push(first);
                rest = &rest[first.len_utf8()..];
                continue;
            }
        };
        shielded.push_str(&format!("{MARK}{}{MARK}", replaced.len()));
        replaced.push(rest[..taken].to_owned());
        rest = &rest[taken..];
    }
    shielded
}

/// Cuts the rendered text at its marks and puts the replaced texts back.
fn segments(rendered: &str, replaced: &[String]) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut parts = rendered.split(MARK);
    // Marks come in pairs, so every second part is a number.
    while let Some(markup) = parts.next() {
        if !markup.is_empty() {
            segments.push(Segment::Markup(markup.to_owned()));
        }
        let original =
            parts.next().and_then(|number| number.parse().ok()).and_then(|n: usize| replaced.get(n));
        if let Some(original) = original {
            segments.push(Segment::Plain(original.clone()));
        }
    }
    segments
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
