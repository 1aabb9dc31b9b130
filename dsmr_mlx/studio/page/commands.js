// The commands of the page by name: for buttons, keys and the list of keys.
import { byId } from "/shared/music.js";

const STEP = 5,
  NUDGE = 0.5; // seconds
const DIGITS = "123456789";

// [name, keys, label of the list, which may be null]
export const COMMANDS = [
  ["play", ["Space"], "Play, pause"],
  ["continue", ["C"], "Continue from the chosen point"],
  ["replace", ["R"], "Replace the marked passage"],
  ["insert", ["I"], "Insert new music at the chosen point"],
  ["lead", ["L"], "Lead to another take"],
  ["hear", ["1", "…", "9"], "Hear one of the alternative takes"],
  ["keep", ["K"], "Keep the take; again: undecided"],
  ["discard", ["X"], "Discard the take; again: undecided"],
  ["undo", ["Z"], "Undo"],
  ["redo", ["Shift Z"], "Redo"],
  ["back", ["←"], "5 seconds back"],
  ["forth", ["→"], "5 seconds forward"],
  ["first", ["Home"], "To the beginning"],
  ["last", ["End"], "To the end"],
  ["from", ["["], "Start the passage at the playhead"],
  ["to", ["]"], "End the passage at the playhead"],
  ["shorter", ["Shift ←"], "End the passage half a second earlier"],
  ["longer", ["Shift →"], "End the passage half a second later"],
  ["closer", ["+"], "Show less time"],
  ["wider", ["−"], "Show more time"],
  ["mark", ["M"], "Mark a passage by touch"],
  ["record", ["Shift R"], "Record what you play"],
  ["duet", ["D"], "Duet"],
  ["turn", ["Enter"], "End the recording, or your turn in the duet"],
  ["piano", ["P"], "Piano on the page; letters play notes"],
  ["tree", ["T"], "Go to the tree of takes; arrows move, Enter selects, F2 renames"],
  ["file", ["O"], "Open a MIDI file"],
  ["export", ["E"], "Export"],
  ["sessions", ["S"], "Sessions: new, open, save a copy"],
  ["stop", ["Esc"], "Stop making music; clear the mark; close the piano"],
  ["help", ["?"], "This list"],
];
export const KEY_LIST = COMMANDS.map(([, keys, label]) => ({ keys, label }));

const BY_KEY = {
  " ": "play",
  "[": "from",
  "]": "to",
  "+": "closer",
  "=": "closer",
  "-": "wider",
  "?": "help",
  ArrowLeft: "back",
  ArrowRight: "forth",
  Home: "first",
  End: "last",
  Escape: "stop",
  Enter: "turn",
  c: "continue",
  r: "replace",
  i: "insert",
  l: "lead",
  k: "keep",
  x: "discard",
  z: "undo",
  m: "mark",
  d: "duet",
  p: "piano",
  t: "tree",
  o: "file",
  e: "export",
  s: "sessions",
};
const WITH_SHIFT = { ArrowLeft: "shorter", ArrowRight: "longer", z: "redo", r: "record" };
const ARROWS = new Set(["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"]);

function commandOf(event) {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (event.ctrlKey || event.metaKey) {
    if (key === "z") return event.shiftKey ? "redo" : "undo";
    return { y: "redo", s: "sessions", o: "file" }[key] ?? null;
  }
  if (event.altKey) return null;
  if (DIGITS.includes(key)) return `hear ${key}`;
  return (event.shiftKey && WITH_SHIFT[key]) || (event.shiftKey && /^[a-z]$/.test(key) ? null : BY_KEY[key]);
}

// Whether an element handles a key itself.
function wants(target, event) {
  const { tagName, type } = target;
  if (target.isContentEditable || tagName === "SELECT" || tagName === "TEXTAREA") return true;
  if (tagName === "INPUT" && type !== "range" && type !== "radio") return true;
  if (tagName === "INPUT") return ARROWS.has(event.key) || (type === "radio" && event.key === " ");
  return ["BUTTON", "SUMMARY", "A"].includes(tagName) && (event.key === " " || event.key === "Enter");
}

export function actions(studio) {
  const { stage, transport } = studio,
    at = () => studio.position();
  return {
    play: () => studio.togglePlay(),
    continue: () => studio.make("continue"),
    nothing: () => studio.make("continue", { fromNothing: true }),
    replace: () => studio.make("replace"),
    insert: () => studio.make("insert"),
    lead: () => studio.chooseLead(),
    keep: () => studio.keep(studio.session.selected, true),
    discard: () => studio.keep(studio.session.selected, false),
    undo: () => studio.send({ type: "undo" }),
    redo: () => studio.send({ type: "redo" }),
    back: () => studio.seek(at() - STEP),
    forth: () => studio.seek(at() + STEP),
    first: () => studio.seek(0),
    last: () => studio.seek(transport.duration),
    from: () => stage.markEdge(0, at()),
    to: () => stage.markEdge(1, at()),
    shorter: () => stage.passage && stage.mark([stage.passage[0], stage.passage[1] - NUDGE]),
    longer: () => (stage.passage ? stage.mark([stage.passage[0], stage.passage[1] + NUDGE]) : stage.markEdge(0, at())),
    closer: () => stage.zoom(Math.SQRT2),
    wider: () => stage.zoom(Math.SQRT1_2),
    mark: () => stage.setMarking(!stage.marking),
    record: () => studio.record(),
    duet: () => studio.duet(),
    turn: () => (studio.live.kind === "listen" ? studio.record() : studio.live.on && studio.send({ type: "turn" })),
    piano: () => studio.keyboard.show(!studio.keyboard.open),
    tree: () => byId("tree").querySelector('[tabindex="0"]')?.focus(),
    file: () => byId("file").click(),
    export: () => studio.chooseExport(),
    sessions: () => studio.send({ type: "sessions" }),
    stop: () => studio.stop(),
    help: () => studio.help(),
  };
}

export function listenToKeys(studio, run) {
  document.addEventListener("keydown", (event) => {
    if (byId("dialog").open || wants(event.target, event)) return;
    let name = commandOf(event);
    if (studio.keyboard.open && !/^(hear|help)/.test(name) && studio.keyboard.onKeyDown(event)) name = null;
    else if (!name || (event.repeat && !ARROWS.has(event.key))) return;
    if (name === "turn" && !studio.live.on) return;
    event.preventDefault();
    if (name && name.startsWith("hear")) studio.hear(Number(name[5]));
    else if (name) run(name);
  });
  document.addEventListener("keyup", (event) => studio.keyboard.onKeyUp(event));
  // Drop the focus after a click, so that the space bar plays and letters are commands.
  document.addEventListener("click", (event) => {
    if (event.detail) event.target.closest("button, input[type=radio]")?.blur();
  });
  let pointed = false; // whether the last input was a pointer's
  document.addEventListener("pointerdown", () => (pointed = true), true);
  document.addEventListener("keydown", () => (pointed = false), true);
  for (const select of document.querySelectorAll("select"))
    select.addEventListener("change", () => pointed && select.blur());
  for (const button of document.querySelectorAll("[data-do]"))
    button.addEventListener("click", () => run(button.dataset.do));
}
