// Notes in columns, sorted by onset, and helpers that every module needs. Times are in seconds.

export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
export const toThousandths = (value) => Math.round(value * 1000) / 1000;
export const byId = (id) => document.getElementById(id);

// Index of the first value above a limit in an ascending array.
export function firstAbove(values, limit) {
  let low = 0,
    high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] > limit) high = middle;
    else low = middle + 1;
  }
  return low;
}

export function clock(seconds, decimals = 0) {
  const scale = 10 ** decimals,
    units = Math.floor(seconds * scale + 1e-6);
  const whole = Math.floor(units / scale),
    minutes = Math.floor(whole / 60) % 60,
    hours = Math.floor(whole / 3600);
  const two = (n) => String(n).padStart(2, "0");
  const rest = decimals ? `.${String(units % scale).padStart(decimals, "0")}` : "";
  return `${hours ? `${hours}:${two(minutes)}` : minutes}:${two(whole % 60)}${rest}`;
}

const NAMES = ["C", "C♯", "D", "E♭", "E", "F", "F♯", "G", "A♭", "A", "B♭", "B"];
export const pitchName = (pitch) => `${NAMES[pitch % 12]}${Math.floor(pitch / 12) - 1}`;
export const isBlack = (pitch) => [1, 3, 6, 8, 10].includes(pitch % 12);

export function setAttribute(node, key, value) {
  if (node.getAttribute(key) !== value) node.setAttribute(key, value);
}

export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Immutable. rows: [onset, offset, pitch, velocity, voice], in any order; voice 0: a person, 1: the model.
// made: music up to here is final, Infinity if nothing grows. pedal: [time, value], in order.
export class Music {
  constructor(rows = [], { made = Infinity, pedal = [] } = {}) {
    const sorted = [...rows].sort((a, b) => a[0] - b[0] || a[2] - b[2]);
    const column = (i) => Float64Array.from(sorted, (row) => row[i] || 0);
    this.count = sorted.length;
    [this.onset, this.end] = [column(0), column(1)];
    [this.pitch, this.velocity, this.voice] = [2, 3, 4].map((i) => Uint8Array.from(sorted, (row) => row[i] || 0));
    this.reach = new Float64Array(this.count); // the latest end of all notes so far
    let last = 0;
    for (let i = 0; i < this.count; i++) this.reach[i] = last = Math.max(last, this.end[i]);
    this.duration = Number.isFinite(made) ? Math.max(made, last) : last;
    this.made = made;
    this.pedal = pedal;
    this.pedalTimes = Float64Array.from(pedal, (row) => row[0]);
  }

  get growing() {
    return Number.isFinite(this.made);
  }

  // Indices of the notes that sound within [from, to).
  *between(from, to) {
    const stop = firstAbove(this.onset, to);
    for (let i = firstAbove(this.reach, from); i < stop; i++) {
      if (this.end[i] > from && this.onset[i] < to) yield i;
    }
  }

  range() {
    let low = 127,
      high = 0;
    for (const pitch of this.pitch) [low, high] = [Math.min(low, pitch), Math.max(high, pitch)];
    return this.count ? [low, high] : [60, 60];
  }
}
