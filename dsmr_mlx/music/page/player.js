// The page of `show --html`: one piece, drawn and played.
import { byId, clock, Music, setAttribute, setText } from "./music.js";
import { samples } from "./piano.js";
import { Overview, PianoRoll, readColours, reducedMotion } from "./piano_roll.js";
import { Transport } from "./transport.js";

const STEP = 5,
  LEAP = 30; // seconds, for the arrow keys and the page keys

// Each note is stored as milliseconds since the previous onset, milliseconds of length, pitch and velocity.
function readPiece({ wait, length, pitch, velocity }) {
  let time = 0;
  return new Music(
    wait.map((milliseconds, i) => {
      time += milliseconds;
      return [time / 1000, (time + length[i]) / 1000, pitch[i], velocity[i]];
    }),
  );
}

class Player {
  constructor(stored) {
    this.start = stored.start;
    this.music = readPiece(stored);
    this.roll = new PianoRoll(byId("roll"), { start: stored.start });
    this.overview = new Overview(byId("overview"), this.roll);
    this.transport = new Transport({
      onChange: () => this.refresh(),
      onFail: (text) => setText(byId("problem"), text),
    });
    this.transport.setVolume(byId("volume").valueAsNumber);
    this.roll.setMusic(this.music);
    this.transport.setMusic(this.music);
    this.pending = false;
    this.listen();
    const problem = this.music.count
      ? window.AudioContext || window.webkitAudioContext
        ? ""
        : "This browser has no Web Audio."
      : "There are no notes.";
    setText(byId("problem"), problem);
    byId("play").disabled = Boolean(problem);
    this.refresh();
    setTimeout(() => samples.prepare(this.music.pitch), 200);
  }

  refresh() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.draw();
      if (this.transport.playing) this.refresh();
    });
  }

  draw() {
    const at = this.transport.shown(),
      play = byId("play"),
      slider = byId("overview");
    this.roll.draw(at);
    this.overview.draw(at);
    const now = clock(this.start + at),
      all = clock(this.start + this.music.duration);
    setText(byId("time"), `${now} / ${all}`);
    setAttribute(slider, "aria-valuenow", String(Math.floor(at)));
    setAttribute(slider, "aria-valuetext", `${now} of ${all}`);
    play.toggleAttribute("data-playing", this.transport.playing);
    setAttribute(play, "aria-label", this.transport.playing ? "Pause" : "Play");
  }

  seek(seconds) {
    this.roll.following = true;
    this.transport.seek(seconds);
  }

  zoom(factor) {
    this.roll.zoom(factor);
    this.refresh();
  }

  toggle() {
    if (byId("play").disabled) return;
    this.roll.following = true;
    this.transport.toggle();
  }

  onKey(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const on = event.target.tagName,
      at = this.transport.shown();
    const moves = { ArrowLeft: at - STEP, ArrowRight: at + STEP, Home: 0, End: this.music.duration };
    if (event.target === byId("overview")) {
      Object.assign(moves, { ArrowDown: at - STEP, ArrowUp: at + STEP, PageDown: at - LEAP, PageUp: at + LEAP });
    }
    if (event.key === " " && on !== "BUTTON" && on !== "SUMMARY") {
      if (!event.repeat) this.toggle();
    } else if (event.key in moves && on !== "INPUT") {
      this.seek(moves[event.key]);
    } else if (event.key === "+" || event.key === "-") {
      this.zoom(event.key === "+" ? Math.SQRT2 : Math.SQRT1_2);
    } else {
      return;
    }
    event.preventDefault();
  }

  listen() {
    const strip = byId("overview"),
      roll = byId("roll"),
      { transport } = this;
    const drag = (event) => this.seek(this.overview.timeAt(event.clientX));
    strip.addEventListener("pointerdown", (event) => {
      strip.setPointerCapture(event.pointerId);
      drag(event);
    });
    strip.addEventListener("pointermove", (event) => {
      if (strip.hasPointerCapture(event.pointerId)) drag(event);
    });
    roll.addEventListener("click", (event) => {
      const at = transport.shown(),
        time = this.roll.timeAt(event.clientX, at);
      if (time >= this.roll.frame(at).from) this.seek(time);
    });
    byId("play").addEventListener("click", () => this.toggle());
    byId("closer").addEventListener("click", () => this.zoom(Math.SQRT2));
    byId("wider").addEventListener("click", () => this.zoom(Math.SQRT1_2));
    byId("volume").addEventListener("input", (event) => transport.setVolume(event.target.valueAsNumber));
    document.addEventListener("keydown", (event) => this.onKey(event));
    document.addEventListener("visibilitychange", () => {
      if (transport.playing) transport.schedule();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.roll.colours = readColours();
      this.refresh();
    });
    reducedMotion.addEventListener("change", () => this.refresh());
    new ResizeObserver(() => this.refresh()).observe(roll);
  }
}

new Player(JSON.parse(byId("notes").textContent));
