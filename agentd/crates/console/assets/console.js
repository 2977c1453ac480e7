// Makes the console's pages live. Every page works without this file.
//
// Never: build markup from text. Whatever comes from an agent is set as textContent.
"use strict";

const REFRESH_MS = 5000;
const LOG_LINES_KEPT = 2000;
const BACKGROUND = { "X-Agentd-Background": "1" };

// --- Parts of the page that follow the machine --------------------------------------------------

/** Fetches this page again and takes over the parts marked `data-live`. */
async function refresh() {
  const answer = await fetch(location.pathname, { headers: BACKGROUND, redirect: "error" });
  if (answer.status === 401) return location.assign("/sign-in");
  if (!answer.ok) throw new Error(answer.statusText);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of document.querySelectorAll("[data-live]")) {
    const next = fresh.getElementById(part.id);
    // A part somebody is using stays until they are done.
    const busy = part.contains(document.activeElement) || part.querySelector("details[open]");
    if (next && !busy && next.innerHTML !== part.innerHTML) part.replaceWith(next);
  }
}

function keepFresh() {
  if (!document.querySelector("[data-live]")) return;
  const offline = document.getElementById("offline");
  let timer = 0;
  const turn = async () => {
    try {
      await refresh();
      offline.hidden = true;
    } catch {
      offline.hidden = false;
    }
    plan();
  };
  const plan = () => {
    clearTimeout(timer);
    if (!document.hidden) timer = setTimeout(turn, REFRESH_MS);
  };
  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : turn()));
  plan();
}

// --- Streams -----------------------------------------------------------------------------------

/** Calls `each` with every JSON value of an NDJSON answer, as it comes. */
async function readLines(answer, each) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line) each(JSON.parse(line));
  }
}

async function reportOf(answer) {
  try {
    return await answer.json();
  } catch {
    return { what: "the request failed", why: `status ${answer.status}`, fix: "try again", code: "" };
  }
}

// --- Small pieces of a page ---------------------------------------------------------------------

function element(tag, classes, text) {
  const made = document.createElement(tag);
  made.className = classes;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Reports are written to stand inside a sentence, with code between backticks; here they begin one. */
function prose(text) {
  const begun = text.charAt(0).toUpperCase() + text.slice(1).replace(/\.+$/, "");
  return begun.split("`").map((piece, index) => (index % 2 ? element("code", "", piece) : piece));
}

function problem(report) {
  const box = element("div", "problem");
  box.setAttribute("role", "alert");
  const [what, why, fix] = ["what", "why", "fix"].map((name) => element("p", name));
  what.append(...prose(report.what));
  why.append(...prose(report.why), ".");
  fix.append(element("span", "label", "What to do "), ...prose(report.fix), ".");
  box.append(what, why, fix);
  if (report.code) box.append(element("p", "code", report.code));
  return box;
}

const atEnd = (box) => box.scrollHeight - box.scrollTop - box.clientHeight < 40;
const toEnd = (box) => (box.scrollTop = box.scrollHeight);

// --- Chat --------------------------------------------------------------------------------------

function randomKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function chat(card) {
  const agent = card.dataset.chat;
  const talk = card.querySelector(".talk");
  const form = card.querySelector("form.say");
  const field = form.elements.text;
  const button = form.querySelector("button");

  // The same key makes a second sending harmless: the message is delivered once.
  async function send(text, key) {
    const reply = element("div", "bubble them waiting", "");
    talk.append(reply);
    toEnd(talk);
    let ended = false;
    const put = (node) => {
      const follow = atEnd(talk);
      talk.insertBefore(node, reply);
      if (follow) toEnd(talk);
    };
    const take = (part) => {
      const follow = atEnd(talk);
      if (part.type === "text") reply.textContent += part.text;
      if (part.type === "note") put(element("div", "note", part.text));
      if (part.type === "failed") put(problem(part.report));
      if (part.type === "done" || part.type === "failed") ended = true;
      if (follow) toEnd(talk);
    };
    try {
      const answer = await fetch(`/api/v1/agents/${encodeURIComponent(agent)}/chat`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ text, idempotency_key: key }),
      });
      if (answer.status === 401) return location.assign("/sign-in");
      if (answer.ok) await readLines(answer, take);
      else {
        put(problem(await reportOf(answer)));
        ended = true;
      }
    } catch {
      // Told below.
    }
    reply.classList.remove("waiting");
    if (!reply.textContent) reply.remove();
    if (!ended) talk.append(again(text, key));
    toEnd(talk);
  }

  function again(text, key) {
    const line = element("div", "note", "The connection broke before the reply was whole. ");
    const retry = element("button", "", "Ask again");
    retry.addEventListener("click", () => {
      line.remove();
      run(text, key);
    });
    line.append(retry);
    return line;
  }

  async function run(text, key) {
    button.disabled = true;
    await send(text, key);
    button.disabled = false;
    field.focus();
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = field.value;
    if (!text.trim() || button.disabled) return;
    field.value = "";
    talk.append(element("div", "bubble me", text));
    run(text, randomKey());
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  toEnd(talk);
}

// --- Log ---------------------------------------------------------------------------------------

function followLog(box) {
  const agent = box.dataset.log;
  const follow = document.getElementById("follow");
  let stop = null;

  function show(line) {
    const stick = atEnd(box);
    const row = element("div", line.stream === "err" || line.stream === "agentd" ? `line ${line.stream}` : "line");
    const time = new Date(line.unix_ms).toISOString().slice(11, 19);
    row.append(element("time", "", time), element("span", "", line.text));
    box.append(row);
    while (box.childElementCount > LOG_LINES_KEPT) box.firstElementChild.remove();
    if (stick) toEnd(box);
  }

  async function run() {
    const mine = new AbortController();
    stop = mine;
    try {
      const url = `/api/v1/agents/${encodeURIComponent(agent)}/logs?lines=200&follow=true`;
      const answer = await fetch(url, { headers: BACKGROUND, signal: mine.signal });
      if (answer.ok) {
        box.replaceChildren();
        await readLines(answer, show);
      }
    } catch {
      // Stopped, or the connection broke: the next turn tells.
    }
    if (stop === mine) setTimeout(() => stop === mine && wanted() && run(), REFRESH_MS);
  }

  const wanted = () => follow.checked && !document.hidden;
  const update = () => {
    stop?.abort();
    stop = null;
    if (wanted()) run();
  };
  follow.closest("label").hidden = false;
  follow.addEventListener("change", update);
  document.addEventListener("visibilitychange", update);
  toEnd(box);
  update();
}

// --- Models ------------------------------------------------------------------------------------

function upload(form) {
  const state = document.getElementById("upload-state");
  const bar = document.getElementById("upload-progress");
  form.hidden = false;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const file = form.elements.file.files[0];
    const name = file.name.replace(/\.gguf$/i, "").replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "");
    const request = new XMLHttpRequest();
    const end = (node) => {
      bar.hidden = true;
      form.querySelector("button").disabled = false;
      state.replaceChildren(node);
    };
    request.upload.addEventListener("progress", (progress) => {
      bar.value = progress.lengthComputable ? (100 * progress.loaded) / progress.total : 0;
      state.textContent = progress.loaded === progress.total ? "The appliance checks the file." : "";
    });
    request.addEventListener("load", () => {
      if (request.status < 300) return location.reload();
      let report = { what: "the file was not taken", why: `status ${request.status}`, fix: "try again", code: "" };
      try {
        report = JSON.parse(request.responseText);
      } catch {
        // Not from the appliance.
      }
      end(problem(report));
    });
    request.addEventListener("error", () => end(element("span", "", "The connection broke. Try again.")));
    request.open("PUT", `/api/v1/models/${encodeURIComponent(name)}`);
    bar.hidden = false;
    form.querySelector("button").disabled = true;
    request.send(file);
  });
}

keepFresh();
document.querySelectorAll("[data-chat]").forEach(chat);
document.querySelectorAll("[data-log]").forEach(followLog);
document.querySelectorAll("#upload").forEach(upload);
