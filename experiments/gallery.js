"use strict";
// All that models and tools wrote becomes text nodes; none of it is markup.
const episodes = JSON.parse(document.getElementById("data").textContent);
const LONG = 1200;
const byId = (id) => document.getElementById(id);
let shown = { episode: 0, step: 1 };

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function block(text, className) {
  if (text.length <= LONG) return element("pre", className, text);
  const details = element("details");
  details.append(
    element("summary", "", `${text.length} characters`),
    element("pre", className, text),
  );
  const both = element("div");
  both.append(element("pre", className, `${text.slice(0, LONG)} ...`), details);
  return both;
}

function readable(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 1);
  } catch {
    return text;
  }
}

function draw(message, number) {
  const role = message.role;
  const known = ["system", "user", "assistant", "tool", "developer"];
  const made = element("article", known.includes(role) ? role : "other");
  made.append(element("h2", "", `${number} ${role}`));
  if (message.reasoning_content) {
    made.append(element("div", "thinking", message.reasoning_content));
  }
  const content = message.content || "";
  if (role === "tool") {
    made.append(block(content, content.startsWith("error: ") ? "error" : ""));
  } else if (content) {
    made.append(element("div", "text", content));
  }
  if (message.malformed) {
    made.append(element("div", "error", `not of the format: ${message.malformed}`));
  }
  for (const call of message.tool_calls || []) {
    const part = element("div", "call");
    part.append(element("b", "", call.function.name));
    part.append(block(readable(call.function.arguments), ""));
    made.append(part);
  }
  if (message.tools && message.tools.length) {
    const names = message.tools.map((tool) => tool.function.name).join(", ");
    const details = element("details");
    details.append(element("summary", "", `tools: ${names}`));
    details.append(element("pre", "", JSON.stringify(message.tools, null, 1)));
    made.append(details);
  }
  return made;
}

function facts(episode) {
  const names = {
    finish: "ended", num_turns: "turns", num_calls: "calls",
    num_bad_calls: "bad calls", num_written_tokens: "tokens written",
    num_context_changes: "context changes", seconds: "seconds", error: "error",
  };
  return Object.entries(names)
    .filter(([name]) => episode[name])
    .map(([name, label]) => {
      const value = episode[name];
      return `${label} ${name === "seconds" ? value.toFixed(1) : value}`;
    })
    .join(", ");
}

function show(episode, step) {
  const another = episode !== shown.episode || !byId("messages").children.length;
  const chosen = episodes[episode];
  const last = chosen.messages.length;
  shown = { episode, step: Math.min(Math.max(step, 1), last) };
  if (another) {
    byId("messages").replaceChildren(
      ...chosen.messages.map((message, place) => draw(message, place + 1)),
    );
    byId("episode").value = String(episode);
    byId("step").max = String(last);
    byId("facts").textContent = facts(chosen);
  }
  const articles = [...byId("messages").children];
  articles.forEach((article, place) => {
    article.hidden = place >= shown.step;
    article.classList.toggle("current", place === shown.step - 1);
  });
  byId("step").value = String(shown.step);
  byId("count").textContent = `${shown.step} of ${last}`;
  const ended = shown.step === last;
  const reward = byId("reward");
  reward.textContent = ended ? `reward ${chosen.reward}` : "";
  reward.className = chosen.reward > 0 ? "good" : "bad";
  articles[shown.step - 1].scrollIntoView({ block: "nearest" });
  history.replaceState(null, "", `#${episode + 1}.${shown.step}`);
}

function fromAddress() {
  const [episode, step] = location.hash.slice(1).split(".").map(Number);
  const known = episode >= 1 && episode <= episodes.length;
  show(known ? episode - 1 : 0, step || 1);
}

function move(episodesOn, step) {
  const wanted = shown.episode + episodesOn;
  if (wanted >= 0 && wanted < episodes.length) show(wanted, step);
}

const KEYS = {
  ArrowRight: () => move(0, shown.step + 1),
  ArrowLeft: () => move(0, shown.step - 1),
  Home: () => move(0, 1),
  End: () => move(0, Infinity),
  ArrowDown: () => move(1, 1),
  ArrowUp: () => move(-1, 1),
};

episodes.forEach((episode, place) => {
  const label = `${episode.id} (reward ${episode.reward})`;
  const option = element("option", "", label);
  option.value = String(place);
  byId("episode").append(option);
});
byId("episode").addEventListener("change", (event) =>
  show(Number(event.target.value), 1));
byId("step").addEventListener("input", (event) =>
  move(0, Number(event.target.value)));
byId("back").addEventListener("click", KEYS.ArrowLeft);
byId("on").addEventListener("click", KEYS.ArrowRight);
document.addEventListener("keydown", (event) => {
  const act = KEYS[event.key];
  if (!act || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  act();
});
window.addEventListener("hashchange", fromAddress);
fromAddress();
