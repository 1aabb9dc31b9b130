// A piano that is synthesized in the browser: samples of strings.js, dampers, pedal, resonance, room, limiter.
import { clamp } from "./music.js";
import { resonance, room, soundOfKey } from "./strings.js";

export const VOICES = 64; // at once, as many as a phone can play
const UNDAMPED = 89; // keys above F6 have no damper
const REACH = 7; // semitones within which one sound can replace another
const SLICE = 8; // milliseconds of computing between two frames
const SYMPATHY = 0.3,
  ROOM = 0.16; // amplitudes
const PREROLL = 0.004; // seconds of fade-in if a note begins in the middle

// Every third key has samples, which its neighbours resample. In high notes that would be audible: each has its own.
const sampledKey = (key) => (key > 78 ? Math.min(key, 115) : clamp(Math.round(key / 3) * 3, 21, 78));

function buffered({ sides, rate }) {
  const buffer = new AudioBuffer({ numberOfChannels: 2, length: sides[0].length, sampleRate: rate });
  sides.forEach((samples, side) => buffer.copyToChannel(samples, side));
  return buffer;
}

// Samples by key, computed in slices while the page is idle or at once when a note needs them.
class Samples {
  constructor() {
    this.done = new Map();
    this.begun = new Map();
    this.queue = [];
    this.timer = 0;
  }

  step(key) {
    if (!this.begun.has(key)) this.begun.set(key, soundOfKey(key));
    const { done, value } = this.begun.get(key).next();
    if (done) {
      this.done.set(key, { body: buffered(value.body), edge: buffered(value.edge) });
      this.begun.delete(key);
    }
    return done;
  }

  // Compute the sounds of these pitches at once.
  compute(pitches) {
    for (const key of new Set([...pitches].map(sampledKey))) while (!this.done.has(key)) this.step(key);
  }

  // The sound of a pitch, or of a near one until its own is computed, so that no key waits for its sound.
  get(pitch) {
    const key = sampledKey(pitch);
    if (this.done.has(key)) return { key, ...this.done.get(key) };
    let near = null;
    for (const each of this.done.keys()) {
      if (Math.abs(each - pitch) <= REACH && (near === null || Math.abs(each - pitch) < Math.abs(near - pitch)))
        near = each;
    }
    if (near === null) this.compute([pitch]);
    else this.prepare([pitch]);
    return { key: near ?? key, ...this.done.get(near ?? key) };
  }

  // Compute the sounds of these pitches next, in this order, before those that wait.
  prepare(pitches) {
    const keys = [...new Set([...pitches].map(sampledKey))].filter((key) => !this.done.has(key));
    this.queue = [...new Set([...keys, ...this.queue])];
    if (this.queue.length && !this.timer) this.timer = setTimeout(() => this.work(), 0);
  }

  work() {
    this.timer = 0;
    const until = performance.now() + SLICE;
    while (this.queue.length && performance.now() < until) {
      if (this.done.has(this.queue[0]) || this.step(this.queue[0])) this.queue.shift();
    }
    if (this.queue.length) this.timer = setTimeout(() => this.work(), 4);
  }
}

export const samples = new Samples();

// The level, and the share of the edge layer, by velocity.
export const loudness = (velocity) => (0.25 + 0.75 * (velocity / 127)) * (velocity / 127) ** 0.95;
export const brightness = (velocity) => (velocity / 127) ** 1.7;

// Linear up to 0.7, then curved so that the output stays below 1.
function softLimit() {
  const curve = new Float32Array(4097),
    knee = 0.7;
  for (let i = 0; i < curve.length; i++) {
    const x = (i / 2048 - 1) * 2,
      size = Math.abs(x);
    const bent = size < knee ? size : knee + (0.98 - knee) * Math.tanh((size - knee) / (0.98 - knee));
    curve[i] = Math.sign(x) * bent;
  }
  return curve;
}

export class Piano {
  constructor(context) {
    this.context = context;
    this.voices = [];
    this.leaving = []; // voices that made room for others, and end when these begin
    this.pressed = new Map(); // live: pitch → voice
    this.held = new Set(); // live: voices that only the pedal holds
    this.pedalDown = false;
    this.connect();
  }

  connect() {
    const { context } = this,
      gain = (value) => this.level(value);
    this.input = gain(1);
    this.volume = gain(0.8);
    this.sympathy = gain(0);
    const wet = gain(ROOM),
      limiter = context.createDynamicsCompressor(),
      bend = context.createWaveShaper();
    const settings = { threshold: -9, knee: 6, ratio: 12, attack: 0.002, release: 0.18 };
    for (const [name, value] of Object.entries(settings)) limiter[name].value = value;
    bend.curve = softLimit();
    const half = gain(0.5); // the curve reaches from -2 to 2
    const chain = [this.volume, limiter, half, bend, context.destination];
    this.input.connect(this.volume);
    const space = this.convolver(room(context.sampleRate));
    [this.input, wet, space, this.volume].reduce((from, to) => (from.connect(to), to));
    this.strings = context.createConvolver();
    this.strings.normalize = false;
    [this.input, this.sympathy, this.strings, this.volume].reduce((from, to) => (from.connect(to), to));
    chain.reduce((from, to) => (from.connect(to), to));
    this.ready = this.tuneStrings();
  }

  level(value) {
    const node = this.context.createGain();
    node.gain.value = value;
    return node;
  }

  convolver(sides) {
    const node = this.context.createConvolver();
    node.normalize = false;
    node.buffer = buffered({ sides, rate: this.context.sampleRate });
    return node;
  }

  // The response of all strings takes a while to compute; the piano plays without it until then.
  async tuneStrings() {
    const work = resonance(this.context.sampleRate);
    let step = work.next();
    while (!step.done) {
      const until = performance.now() + SLICE;
      while (!step.done && performance.now() < until) step = work.next();
      await new Promise((resolve) => setTimeout(resolve, 4));
    }
    this.strings.buffer = buffered({ sides: step.value, rate: this.context.sampleRate });
  }

  setVolume(value) {
    this.volume.gain.setTargetAtTime(value * value * 1.25, this.context.currentTime, 0.02);
  }

  // Returns the voice, or null if nothing audible is left. when, until: on the context's clock, `until` may be
  // Infinity. age: seconds since the note began, for a note that already sounds where playback starts.
  play(pitch, velocity, when, until, age = 0) {
    const { key, body, edge } = samples.get(pitch),
      speed = 2 ** ((pitch - key) / 12);
    const left = body.duration / speed - age;
    if (left <= 0.02) return null;
    this.makeRoom(when);
    this.restrike(pitch, when);
    const out = this.level(0),
      level = loudness(velocity);
    if (age > 0) {
      out.gain.setValueAtTime(0, when);
      out.gain.linearRampToValueAtTime(level, when + PREROLL);
    } else {
      out.gain.setValueAtTime(level, when);
    }
    out.connect(this.input);
    const sources = [this.source(body, speed, when, age, out)];
    if (edge.duration / speed > age + 0.02) {
      const share = this.level(brightness(velocity));
      share.connect(out);
      sources.push(this.source(edge, speed, when, age, share));
    }
    const voice = { pitch, level, sources, out, when, until: when + left, released: false };
    this.voices.push(voice);
    if (until < when + left) this.release(voice, until);
    return voice;
  }

  source(buffer, speed, when, age, target) {
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.playbackRate.value = speed;
    source.connect(target);
    source.start(when, age * speed);
    return source;
  }

  // The damper falls on the string; it takes longer on the thick ones.
  release(voice, at) {
    if (voice.released || voice.pitch > UNDAMPED) return;
    voice.released = true;
    this.fade(voice, Math.max(at, voice.when + 0.02), 0.045 + 0.08 * clamp((70 - voice.pitch) / 49, 0, 1));
  }

  fade(voice, at, time) {
    voice.out.gain.setTargetAtTime(0, at, time);
    voice.until = Math.min(voice.until, at + 8 * time);
    for (const source of voice.sources) source.stop(at + 8 * time);
  }

  // A new strike of a key replaces its previous sound.
  restrike(pitch, when) {
    for (const voice of this.voices) {
      if (voice.pitch === pitch && voice.when < when && voice.until > when) this.silence(voice, when, 0.03);
    }
  }

  makeRoom(when) {
    const now = this.context.currentTime;
    this.voices = this.voices.filter((voice) => voice.until > now);
    this.leaving = this.leaving.filter((voice) => voice.until > now);
    while (this.voices.length >= VOICES) {
      const fading = this.voices.findIndex((voice) => voice.released && voice.until < when + 0.5);
      const [voice] = this.voices.splice(Math.max(fading, 0), 1);
      this.silence(voice, when);
      this.leaving.push(voice);
    }
  }

  // 2 ms later, so that the start of a note that begins at `when` is not cancelled.
  silence(voice, when, time = 0.01) {
    this.cut(voice, Math.max(when, voice.when) + 0.002, time);
  }

  // Nothing of a voice that has not begun by `at` is heard.
  cut(voice, at, time = 0.01) {
    voice.out.gain.cancelScheduledValues(at);
    voice.out.gain.setTargetAtTime(0, at, time);
    voice.until = Math.min(voice.until, at + 8 * time);
    for (const source of voice.sources) source.stop(at + 8 * time);
  }

  // Silence what sounds and what is scheduled.
  silenceAll() {
    const now = this.context.currentTime;
    for (const voice of [...this.voices, ...this.leaving]) this.cut(voice, now);
    this.voices = [];
    this.leaving = [];
    this.sympathy.gain.cancelScheduledValues(now);
    this.setResonance(false, now);
  }

  setResonance(down, when) {
    this.sympathy.gain.setTargetAtTime(down ? SYMPATHY : 0, when, down ? 0.03 : 0.08);
  }

  // Keys played live.
  press(pitch, velocity) {
    this.lift(pitch, true);
    const voice = this.play(pitch, velocity, this.context.currentTime, Infinity);
    if (voice) this.pressed.set(pitch, voice);
  }

  lift(pitch, again = false) {
    const voice = this.pressed.get(pitch);
    this.pressed.delete(pitch);
    if (!voice || again) return;
    if (this.pedalDown) this.held.add(voice);
    else this.release(voice, this.context.currentTime);
  }

  setPedal(value) {
    this.pedalDown = value >= 64;
    this.setResonance(this.pedalDown, this.context.currentTime);
    if (this.pedalDown) return;
    for (const voice of this.held) this.release(voice, this.context.currentTime);
    this.held.clear();
  }
}
