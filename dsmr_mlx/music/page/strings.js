// The sound of one piano key as samples: partials with inharmonicity and decay, unison strings, hammer noise.
// Each key has two layers: `body`, the soft note, and `edge`, added by a hard strike. A note is a mixture of both.
import { clamp } from "./music.js";

export const RATE = 44100; // Hz, of the samples
const MAX_PARTIALS = 48,
  BODY_SECONDS = 6,
  EDGE_SECONDS = 4; // at most
const FLOOR = 4e-4; // the amplitude at which a partial ends
const DULL = 58; // the body of lower keys has no high partials: half the rate is enough
const STRIKE = 8.3; // the hammer strikes at this fraction of the string
const BOARD = 90; // Hz, below which the soundboard is too small
const LEVEL = 0.085; // root mean square of the first 0.15 s of the hardest strike at middle C

// A small seeded random number generator, so that every page sounds the same.
export function randomNumbers(seed) {
  let state = (seed * 7919 + 13) % 2147483647;
  return () => (state = (state * 16807) % 2147483647) / 2147483647;
}

// The stiffness of the strings rises towards both ends of the keyboard.
const inharmonicity = (key) => Math.exp(-0.085 * key - 5.8) + Math.exp(0.0926 * key - 13.6);

// Hz; octaves are a little wide, as on a tuned piano.
export const tuned = (key) => 440 * 2 ** ((key - 69) / 12 + (18 * ((key - 69) / 40) ** 3) / 1200);

// How strongly the hammer excites partial k. cutoff: Hz above the fundamental where it fades.
function hammer(k, frequency, fundamental, cutoff) {
  const node = 0.12 + 0.88 * Math.abs(Math.sin((Math.PI * k) / STRIKE));
  const board = frequency ** 2 / (frequency ** 2 + BOARD ** 2);
  return ((board * node) / k ** 0.45) * Math.exp(-(frequency - fundamental) / cutoff);
}

// Seconds in which the lasting part of the fundamental falls by a factor e.
export const lasting = (key) => 5 * 2 ** ((45 - key) / 22);

// Adds a decaying sine to samples. frequency: Hz, phase: radians, decay: seconds.
function addSine(samples, rate, strength, { frequency, phase, decay }) {
  const angle = (2 * Math.PI * frequency) / rate,
    factor = Math.exp(-1 / (rate * decay));
  const turn = 2 * factor * Math.cos(angle),
    damp = factor * factor;
  const steps = Math.min(samples.length, Math.ceil(Math.log(strength / FLOOR) * decay * rate));
  let before = (strength * Math.sin(phase - angle)) / factor,
    now = strength * Math.sin(phase);
  for (let i = 0; i < steps; i++) {
    samples[i] += now;
    const next = turn * now - damp * before;
    before = now;
    now = next;
  }
}

// The wood: a knock of short, dense resonances, higher for high keys.
function addKnock(samples, rate, key, side, strength) {
  const centre = 260 * 2 ** ((key - 21) / 30),
    random = randomNumbers(key + 500 + 200 * side);
  for (let i = 0; i < 22; i++) {
    const sine = {
      frequency: centre * 2 ** (4 * random() - 1.4),
      decay: 0.006 + 0.022 * random(),
      phase: 6.3 * random(),
    };
    if (sine.frequency < 0.42 * rate) addSine(samples, rate, strength * (0.4 + random()), sine);
  }
}

function shape(samples, rate, attack, tail) {
  const rise = Math.round(attack * rate),
    fade = Math.round(tail * rate),
    { length } = samples;
  for (let i = 0; i < rise; i++) samples[i] *= 0.5 - 0.5 * Math.cos((Math.PI * i) / rise);
  for (let i = 1; i <= fade; i++) samples[length - i] *= i / fade;
}

const silence = (rate, seconds) => ({ rate, sides: [0, 1].map(() => new Float32Array(Math.round(rate * seconds))) });

// Yields after each partial, so that a page stays responsive. Returns { body, edge }, each { rate, sides }: two channels.
export function* soundOfKey(key) {
  const random = randomNumbers(key),
    fundamental = tuned(key),
    stiffness = inharmonicity(key);
  const body = silence(key < DULL ? RATE / 2 : RATE, clamp(3 * lasting(key), 0.7, BODY_SECONDS));
  const edge = silence(RATE, clamp(0.8 * lasting(key), 0.7, EDGE_SECONDS)),
    unison = key < 34 ? 0 : key < 46 ? 0.7 : 1; // one, two or three strings
  const soft = 300 + 0.6 * fundamental,
    hard = 2500 + 1.5 * fundamental;
  for (let k = 1; k <= MAX_PARTIALS; k++) {
    const frequency = k * fundamental * Math.sqrt((1 + stiffness * k * k) / (1 + stiffness));
    const weak = hammer(k, frequency, fundamental, soft),
      strong = hammer(k, frequency, fundamental, hard);
    if (frequency > 0.42 * RATE || strong < 4 * FLOOR) break;
    const slow = 1 / (1 / lasting(key) + 2.4e-7 * (frequency ** 2 - fundamental ** 2));
    const fast = slow * (0.28 + 0.14 * random()),
      start = 0.8 * random();
    for (const side of [0, 1]) {
      const beat = unison * (0.0003 + 0.0006 * random()) * (side ? 1 : -1);
      const phase = start + (random() - 0.5) * (frequency > 300 ? 1.6 : 0.5); // low partials stay in the middle
      for (const [share, decay, detune] of [
        [0.74, fast, 0],
        [0.26, slow, beat],
      ]) {
        const sine = { frequency: frequency * (1 + detune), phase, decay };
        addSine(body.sides[side], body.rate, share * weak, sine);
        addSine(edge.sides[side], edge.rate, share * (strong - weak), sine);
      }
      yield;
    }
  }
  finish(key, body, edge);
  return { body, edge };
}

// Equalize loudness over the keyboard, add the knock and the attack, and place the key from left to right.
function finish(key, body, edge) {
  let power = 0;
  for (const { rate, sides } of [body, edge]) {
    for (const samples of sides) {
      const early = samples.subarray(0, Math.round(0.15 * rate));
      power += early.reduce((sum, x) => sum + x * x, 0) / (2 * early.length);
    }
  }
  const scale = (LEVEL * 2 ** ((60 - key) / 60)) / Math.sqrt(power);
  const angle = (1 + clamp((key - 64) / 120, -0.28, 0.28)) * (Math.PI / 4);
  const balance = [Math.SQRT2 * Math.cos(angle), Math.SQRT2 * Math.sin(angle)],
    knock = 0.008 * 2 ** ((key - 60) / 48);
  const layers = [
    [body, 0.25, key < 50 ? 0.004 : 0.0025, 0.25],
    [edge, 1, 0.001, 0.25],
  ];
  for (const [layer, share, attack, tail] of layers) {
    layer.sides.forEach((samples, side) => {
      for (let i = 0; i < samples.length; i++) samples[i] *= scale * balance[side];
      addKnock(samples, layer.rate, key, side, share * knock);
      shape(samples, layer.rate, attack, tail * (samples.length / layer.rate));
    });
  }
}

// The sympathetic strings while the pedal is down, as the impulse response of a convolution: two channels.
export function* resonance(rate, seconds = 1.8) {
  const { sides } = silence(rate, seconds),
    random = randomNumbers(99);
  for (let key = 22; key < 94; key++) {
    for (const k of [1, 2]) {
      const frequency = k * tuned(key),
        decay = (0.4 * lasting(key)) / k;
      if (frequency > 3000) break;
      for (const samples of sides) addSine(samples, rate, 1 / k, { frequency, decay, phase: 6.3 * random() });
      yield;
    }
  }
  for (const samples of sides) settle(samples, rate, 0.03, 0.4);
  return sides;
}

// The room and the wood of the piano: dense noise that decays and grows darker.
export function room(rate, seconds = 1.1) {
  const random = randomNumbers(7),
    { sides } = silence(rate, seconds);
  for (const samples of sides) {
    let dark = 0;
    for (let i = 0; i < samples.length; i++) {
      const at = i / rate;
      dark += (0.08 + 0.5 * Math.exp(-at / 0.25)) * (2 * random() - 1 - dark);
      samples[i] = dark * Math.exp(-at / 0.19);
    }
    settle(samples, rate, 0.012, 0.2);
  }
  return sides;
}

// Fade in and out, and normalize to unit energy.
function settle(samples, rate, attack, tail) {
  const rise = Math.round(attack * rate),
    fade = Math.round(tail * rate);
  for (let i = 0; i < rise; i++) samples[i] *= (i / rise) ** 2;
  for (let i = 1; i <= fade; i++) samples[samples.length - i] *= i / fade;
  const scale = 1 / Math.sqrt(samples.reduce((sum, x) => sum + x * x, 0));
  for (let i = 0; i < samples.length; i++) samples[i] *= scale;
}
