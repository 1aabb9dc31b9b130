// The status line, the labels and states of buttons, progress, and whose turn it is.
import { byId, clock, setAttribute, setText } from "/shared/music.js";

const SAID = {
  loading: "Loading the model",
  reading: "Reading the music",
  making: "Making music",
  ranking: "Choosing the best",
  listening: "Recording: play",
  duet: "Duet",
};

function idleText(studio) {
  const { session } = studio,
    { take } = session;
  if (session.empty || !take) return "Ready";
  if (take.parent === null && !session.children(take.id).length) {
    return `${take.name}. Continue starts at the end, or where you click`;
  }
  return `${take.name}, ${studio.music.count} notes`;
}

// The text with a capital first letter, unless it begins with the name of a model.
const sentence = (text, models) =>
  models.some(({ title }) => text.startsWith(title)) ? text : text.charAt(0).toUpperCase() + text.slice(1);

export function statusText(studio) {
  const { session, transport, live } = studio,
    { status } = session;
  if (!studio.socket.open)
    return studio.wasOpen ? "The studio does not answer: is the program still running? Trying again …" : "Connecting …";
  const slow =
    transport.speed !== null && transport.speed < 1 ? `: ${transport.speed.toFixed(1)} s of music made per second` : "";
  const doing = sentence(status.text, session.models) || SAID[status.activity];
  if (live.kind === "listen") return live.rows.length ? "Recording" : "Ready to record";
  if (transport.waiting && status.activity !== "idle") return `${doing} – waiting for the music${slow}`;
  if (status.activity === "making" && transport.playing && transport.ahead < Infinity)
    return `${doing}, ${Math.round(transport.ahead)} s ahead of you`;
  if (status.activity !== "idle") return doing;
  if (studio.making) return "Starting";
  return idleText(studio);
}

// For screen readers: changes of activity only, not each second of progress.
function spoken(studio) {
  const { session } = studio,
    { activity } = session.status;
  if (!studio.socket.open) return studio.wasOpen ? "The studio does not answer. Trying again." : "";
  if (studio.live.on) return turnOf(studio)[1];
  return activity === "idle" ? idleText(studio) : SAID[activity];
}

function showProgress({ session }) {
  const bar = byId("progress"),
    { activity, progress } = session.status;
  bar.hidden = activity === "idle" || activity === "listening" || activity === "duet";
  bar.classList.toggle("unknown", progress === null);
  if (progress === null) bar.removeAttribute("aria-valuenow");
  else setAttribute(bar, "aria-valuenow", String(Math.round(progress * 100)));
  bar.firstChild.style.width = progress === null ? "" : `${100 * progress}%`;
}

// What to do now, in a recording or a duet: [class, title, hint, label of the button or null].
function turnOf({ session, live }) {
  if (live.kind === "listen") {
    const hint = live.rows.length ? `${live.rows.length} notes` : "Starts with the first note that you play";
    return ["", "Recording", hint, "Done"];
  }
  if (session.status.turn === "model") return ["model", "The model plays", "Play to interrupt", null];
  return ["", "Your turn", "Play; a pause ends your turn", "End your turn"];
}

function showTurn(studio) {
  const turn = byId("turn"),
    [name, title, hint, label] = turnOf(studio);
  turn.hidden = !studio.live.on;
  turn.className = name;
  setText(turn.querySelector("b"), title);
  setText(turn.querySelector("span"), hint);
  turn.querySelector("button").hidden = label === null;
  setText(turn.querySelector("button"), label ?? "");
}

function showButtons(studio) {
  const { session, stage, live, point } = studio,
    online = studio.socket.open,
    { take } = session;
  const music = online && take !== null && studio.music.count > 0,
    where = point === null ? "the end" : clock(point);
  setText(byId("continue"), take === null || session.empty ? "Begin a piece" : `Continue from ${where}`);
  setText(byId("insert"), `Insert at ${where}`);
  const { passage } = stage;
  setText(byId("replace"), passage ? `Replace ${clock(passage[0], 1)}–${clock(passage[1], 1)}` : "Replace passage");
  byId("replace").title = passage
    ? "Replace the marked passage (R)"
    : "Drag over the music to mark a passage, then replace it (R)";
  byId("replace").classList.toggle("strong", passage !== null);
  byId("continue").classList.toggle("strong", passage === null);
  byId("continue").disabled = !online;
  byId("replace").disabled = !music || passage === null;
  byId("insert").disabled = byId("lead").disabled = !music;
  byId("mark").disabled = !music;
  setAttribute(byId("mark"), "aria-pressed", String(stage.marking));
  byId("stop").hidden = session.status.activity === "idle";
  for (const [id, on] of [
    ["record", live.kind === "listen"],
    ["duet", live.kind === "duet"],
    ["show-piano", studio.keyboard.open],
  ]) {
    setAttribute(byId(id), "aria-pressed", String(on));
    byId(id).disabled = !online && id !== "show-piano";
  }
  for (const [name, can] of [
    ["undo", session.canUndo],
    ["redo", session.canRedo],
    ["export", music],
    ["file", true],
    ["nothing", true],
  ]) {
    for (const button of document.querySelectorAll(`[data-do="${name}"]`)) button.disabled = !online || !can;
  }
}

export function render(studio) {
  const { session, transport } = studio,
    text = statusText(studio),
    status = byId("status");
  setText(byId("status-text"), text);
  setAttribute(status, "title", text);
  const { activity, recording } = session.status,
    shown = recording ? "listening" : activity === "idle" && studio.making ? "making" : activity;
  status.className = studio.socket.open ? shown : "lost";
  setText(byId("said"), spoken(studio));
  setText(byId("session"), session.name || "Studio");
  document.title = session.name ? `${session.name} – Studio` : "Studio";
  byId("start").hidden = !session.empty || studio.live.on || session.status.activity !== "idle" || !studio.socket.open;
  byId("play").disabled = !studio.music.count && !studio.music.growing;
  byId("play").toggleAttribute("data-playing", transport.playing);
  setAttribute(byId("play"), "aria-label", transport.playing ? "Pause" : "Play");
  showProgress(studio);
  showTurn(studio);
  showButtons(studio);
}
