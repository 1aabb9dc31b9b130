// One dialog with different contents: sessions, export, the take to lead to, and the list of keys.
import { byId, clock, setText } from "/shared/music.js";

export function make(tag, attributes = {}, ...content) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...content);
  return node;
}

export function closeDialog() {
  byId("dialog").close();
}

function open(title, ...content) {
  setText(byId("dialog-title"), title);
  byId("dialog-body").replaceChildren(...content);
  if (!byId("dialog").open) byId("dialog").showModal();
  (byId("dialog-body").querySelector("input, button, a") || byId("dialog").querySelector(".close")).focus();
}

function choice(title, note, onClick) {
  const button = make(
    "button",
    { type: "button", class: "choice" },
    make("b", {}, title),
    make("span", { class: "remark" }, note),
  );
  button.addEventListener("click", () => {
    closeDialog();
    onClick();
  });
  return button;
}

const ago = (changed) => new Date(changed * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

function nameField(label, action, onName) {
  const input = make("input", {
    type: "text",
    maxlength: "100",
    "aria-label": label,
    placeholder: label,
    required: "",
  });
  const button = make("button", { type: "button", class: "small" }, action);
  const done = () => {
    const name = input.value.trim();
    if (!name) return input.focus();
    closeDialog();
    onName(name);
  };
  button.addEventListener("click", done);
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    done();
  });
  return make("div", { class: "name" }, input, button);
}

// sessions: [{ name, changed, takes }]; actions: open(name), create(name), saveAs(name), upload()
export function sessionsDialog(sessions, current, actions) {
  const others = sessions.filter(({ name }) => name !== current).sort((a, b) => b.changed - a.changed);
  const list = others.map(({ name, changed, takes }) =>
    choice(name, [...(takes === null ? [] : [`${takes} takes`]), ago(changed)].join(", "), () => actions.open(name)),
  );
  const save = make(
    "a",
    { href: "/session", download: "", class: "choice" },
    make("b", {}, "Download this session"),
    make("span", { class: "remark" }, "one file with notes, takes and settings"),
  );
  open(
    "Sessions",
    make("p", {}, "This is ", make("b", {}, current), ". All changes are saved."),
    nameField("Name of a new session", "New", actions.create),
    nameField("Name of a copy", "Save a copy", actions.saveAs),
    save,
    choice("Open a downloaded session…", "adds it to your sessions", actions.upload),
    ...(list.length ? [make("h3", {}, "Other sessions"), ...list] : []),
  );
}

const EXPORTS = {
  mid: ["MIDI", "for any sequencer, notation program or piano"],
  svg: ["Picture (SVG)", "a piano roll to print or edit"],
  png: ["Picture (PNG)", "a piano roll to share"],
  wav: ["Audio (WAV)", "played with a SoundFont"],
};

export function exportDialog(take, endings) {
  const links = endings.map((ending) => {
    const [title, note] = EXPORTS[ending] || [ending.toUpperCase(), ""];
    return make(
      "a",
      { href: `/export/${take.id}.${ending}`, download: "", class: "choice" },
      make("b", {}, title),
      make("span", { class: "remark" }, note),
    );
  });
  open(`Export ${take.name}`, ...links);
}

export function leadDialog(takes, lead) {
  const list = takes.map((take) => choice(take.name, clock(take.end), () => lead(take.id)));
  const none = make(
    "p",
    {},
    "No other piece to lead to yet. Open a MIDI file, or begin another piece from scratch.",
  );
  open("Lead to the beginning of …", ...(list.length ? list : [none]));
}

// commands: [{ keys, label }]
export function helpDialog(commands) {
  const rows = commands.map(({ keys, label }) =>
    make("div", {}, make("dt", {}, ...keys.map((key) => make("kbd", {}, key))), make("dd", {}, label)),
  );
  open(
    "Keys",
    make("dl", { class: "help" }, ...rows),
    make(
      "p",
      { class: "remark" },
      "In the music: click to choose a point, drag to mark a passage. The wheel scrolls, with Ctrl it zooms.",
    ),
  );
}
