// The piano on the page: mouse and touch, and the computer's keys while it is open. Web MIDI on request.
import { byId, clamp, isBlack, pitchName, setText } from "/shared/music.js";
import { samples } from "/shared/piano.js";

const CODES = [
  "KeyA",
  "KeyW",
  "KeyS",
  "KeyE",
  "KeyD",
  "KeyF",
  "KeyT",
  "KeyG",
  "KeyY",
  "KeyH",
  "KeyU",
  "KeyJ",
  "KeyK",
  "KeyO",
  "KeyL",
];
const TYPED = 78; // velocity
const PAGE = "page"; // its own pedal
const STUDIO = "dsmr-mlx studio"; // in the names of the ports that the studio makes: it would hear itself
const MIN_WIDTH = 22; // pixels of a white key

export class Keyboard {
  // press(pitch, velocity), lift(pitch), pedal(value), changed()
  constructor({ press, lift, pedal, changed }) {
    Object.assign(this, { press, lift, pedal, changed, low: 60, open: false, first: 0, last: -1 });
    this.board = byId("keys");
    this.down = new Map(); // the holder of a key (a pointer, the code of a key, input and number of MIDI) → pitch
    this.pedals = new Map(); // the holder of a pedal (PAGE, or an input of MIDI) → value
    this.lit = new Map();
    this.webMidi = null; // the browser's MIDI access while in use
    byId("lower").addEventListener("click", () => this.shift(-12));
    byId("higher").addEventListener("click", () => this.shift(12));
    byId("sustain").addEventListener("click", () => this.setPedal(PAGE, this.pedals.has(PAGE) ? 0 : 127));
    this.board.addEventListener("pointerdown", (event) => this.onPointer(event));
    this.board.addEventListener("pointermove", (event) => this.down.has(event.pointerId) && this.onPointer(event));
    for (const type of ["pointerup", "pointercancel"]) {
      this.board.addEventListener(type, (event) => this.release(event.pointerId));
    }
    window.addEventListener("blur", () => this.releaseAll());
    new ResizeObserver(() => this.open && this.layOut()).observe(this.board);
  }

  show(open) {
    this.open = open;
    byId("piano").hidden = !open;
    if (open) {
      this.layOut();
      const pitches = Array.from({ length: 88 }, (_, i) => 21 + i);
      samples.prepare(pitches.sort((a, b) => Math.abs(a - this.low - 6) - Math.abs(b - this.low - 6)));
    } else {
      this.releaseAll();
    }
    this.changed();
  }

  shift(by) {
    this.low = clamp(this.low + by, 24, 96);
    this.releaseAll();
    this.layOut();
  }

  // As many octaves as there is room for, around the octave that the letters play.
  layOut() {
    const octaves = clamp(Math.floor(this.board.clientWidth / (7 * MIN_WIDTH)), 1, 7);
    const first = octaves >= 7 ? 21 : clamp(this.low - 12 * Math.floor((octaves - 1) / 2), 24, 108 - 12 * octaves);
    const last = octaves >= 7 ? 108 : first + 12 * octaves;
    setText(byId("octave"), pitchName(this.low));
    if (first !== this.first || last !== this.last) {
      [this.first, this.last] = [first, last];
      this.board.replaceChildren();
      const whites = [];
      for (let pitch = first; pitch <= last; pitch++) if (!isBlack(pitch)) whites.push(pitch);
      for (let pitch = first; pitch <= last; pitch++) {
        const key = document.createElement("i"),
          before = whites.filter((white) => white < pitch).length;
        key.className = isBlack(pitch) ? "black" : "white";
        key.dataset.pitch = pitch;
        key.style.left = `${((isBlack(pitch) ? before - 0.3 : before) / whites.length) * 100}%`;
        key.style.width = `${((isBlack(pitch) ? 0.6 : 1) / whites.length) * 100}%`;
        this.board.append(key);
      }
    }
    for (const key of this.board.children) {
      const place = key.dataset.pitch - this.low,
        letter = CODES[place];
      setText(key, letter ? letter[3] : key.dataset.pitch % 12 === 0 ? pitchName(Number(key.dataset.pitch)) : "");
    }
    this.lit = new Map();
  }

  // sounding: pitch → voice
  light(sounding) {
    if (!this.open) return;
    for (const key of this.board.children) {
      const voice = sounding.get(Number(key.dataset.pitch));
      key.classList.toggle("person", voice === 0);
      key.classList.toggle("model", voice === 1);
    }
  }

  onPointer(event) {
    event.preventDefault();
    const key = document.elementFromPoint(event.clientX, event.clientY);
    if (event.type === "pointerdown") this.board.setPointerCapture(event.pointerId);
    if (!key || !key.dataset.pitch) return event.type === "pointerdown" ? undefined : this.release(event.pointerId);
    const pitch = Number(key.dataset.pitch),
      box = key.getBoundingClientRect();
    if (this.down.get(event.pointerId) === pitch) return;
    this.release(event.pointerId);
    this.hold(event.pointerId, pitch, Math.round(40 + 65 * clamp((event.clientY - box.top) / box.height, 0, 1)));
  }

  hold(by, pitch, velocity) {
    this.release(by);
    this.down.set(by, pitch);
    this.press(pitch, velocity);
  }

  release(by) {
    const pitch = this.down.get(by);
    if (!this.down.delete(by)) return;
    if (![...this.down.values()].includes(pitch)) this.lift(pitch);
  }

  releaseAll() {
    for (const by of [...this.down.keys()]) this.release(by);
    for (const by of [...this.pedals.keys()]) this.setPedal(by, 0);
  }

  // The pedal is as far down as the one that is furthest down.
  setPedal(by, value) {
    if (value) this.pedals.set(by, value);
    else if (!this.pedals.delete(by)) return;
    byId("sustain").setAttribute("aria-pressed", String(this.pedals.has(PAGE)));
    this.pedal(Math.max(0, ...this.pedals.values()));
  }

  // Returns whether the piano uses the key of the computer.
  onKeyDown(event) {
    if (!this.open || event.ctrlKey || event.metaKey || event.altKey) return false;
    const place = CODES.indexOf(event.code);
    if (event.key === "Shift") {
      if (!event.repeat) this.setPedal(PAGE, 127);
    } else if (event.code === "KeyZ" || event.code === "KeyX") {
      this.shift(event.code === "KeyZ" ? -12 : 12);
    } else if (place >= 0) {
      if (!event.repeat) this.hold(event.code, this.low + place, TYPED);
    } else {
      return false;
    }
    return true;
  }

  onKeyUp(event) {
    if (event.key === "Shift") this.setPedal(PAGE, 0);
    this.release(event.code);
  }

  // MIDI keyboards of the browser. Returns a line about what was found; throws if the browser refuses.
  async useWebMidi() {
    const access = await navigator.requestMIDIAccess();
    this.leaveWebMidi(); // may be called twice
    this.webMidi = access;
    const inputs = () => [...access.inputs.values()].filter((input) => !input.name?.includes(STUDIO));
    const attach = () => {
      for (const input of inputs()) input.onmidimessage = ({ data }) => this.onMidi(input.id, data);
    };
    access.onstatechange = ({ port }) => {
      attach();
      if (port.state === "disconnected") this.releaseInput(port.id);
    };
    attach();
    const names = inputs().map((input) => input.name);
    return names.length ? `Listening to ${names.join(", ")}` : "No MIDI keyboard is connected to this browser yet";
  }

  leaveWebMidi() {
    if (!this.webMidi) return;
    this.webMidi.onstatechange = null;
    for (const input of this.webMidi.inputs.values()) input.onmidimessage = null;
    this.webMidi = null;
    this.releaseAll();
  }

  // An input of MIDI is gone.
  releaseInput(id) {
    for (const by of [...this.down.keys()]) if (String(by).startsWith(`${id} `)) this.release(by);
    this.setPedal(id, 0);
  }

  onMidi(id, [status, first, second]) {
    const kind = status & 0xf0,
      by = `${id} ${first}`;
    if (kind === 0x90 && second) this.hold(by, first, second);
    else if (kind === 0x80 || kind === 0x90) this.release(by);
    else if (kind === 0xb0 && first === 64) this.setPedal(id, second);
  }
}
