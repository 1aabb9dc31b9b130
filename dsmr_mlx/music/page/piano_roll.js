// A piano roll on a canvas: keys at the left, time below, notes, playhead, a marked passage. It follows the playhead
// until the user scrolls.
import { clamp, clock, isBlack } from "./music.js";

const CLOCK_STEPS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600];
const SHADES = 8;
const PICTURE_PERIOD = 500; // milliseconds between two pictures of a growing piece
const COLOURS = ["paper", "ink", "muted", "grid", "base", "train", "validation", "well"];
export const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");

export function readColours() {
  const style = getComputedStyle(document.documentElement);
  const colours = Object.fromEntries(COLOURS.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  const dark = matchMedia("screen and (prefers-color-scheme: dark)").matches;
  return { ...colours, ivory: dark ? "#c3c9ce" : "#fbfbf9", ebony: dark ? "#1d2125" : "#24292e" };
}

// Resize a canvas to its size on the screen. Returns its drawing context in CSS pixels.
export function fitCanvas(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * ratio),
    height = Math.round(canvas.clientHeight * ratio);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
  return pen;
}

const strength = (velocity) => 0.3 + (0.7 * Math.floor((velocity * SHADES) / 128)) / (SHADES - 1);

export class PianoRoll {
  // start: seconds added to the times of the axis. room: seconds shown after the end. minKeys: smallest range of pitches.
  constructor(canvas, { start = 0, room = 0, minKeys = 24 } = {}) {
    Object.assign(this, { canvas, start, room, minKeys, zoomed: 1, from: 0, following: true, colours: readColours() });
    this.music = null;
    this.fresh = [];
    this.passage = null; // [start, end]
    this.own = null; // [begin, end] of the take's own music
    this.ghosts = []; // Music of other takes, drawn behind
    this.point = null; // seconds, where new music will begin
    this.lit = new Map(); // pitch → voice, of keys that are down now
  }

  // fresh: rows of a recording that the music lacks yet; their end is null while the key is down.
  setMusic(music, fresh = []) {
    Object.assign(this, { music, fresh });
    const pitches = fresh.map((row) => row[2]),
      range = music.count || !fresh.length ? music.range() : [];
    const lowest = Math.min(...range, ...pitches),
      highest = Math.max(...range, ...pitches),
      spare = Math.max(this.minKeys - (highest - lowest), 4) / 2;
    const low = clamp(Math.round(lowest - spare), -2, 120);
    [this.low, this.span] = [low, highest - low + spare];
  }

  // Sizes in CSS pixels and seconds. The view follows the playhead, or turns pages if the user prefers reduced motion.
  frame(at) {
    const { clientWidth, clientHeight } = this.canvas,
      unit = clamp(clientWidth / 1500, 1, 2);
    const left = clientWidth < 500 ? 42 : 50 * unit,
      bottom = 20 * unit;
    const width = clientWidth - left,
      height = clientHeight - bottom,
      duration = Math.max(this.music.duration, at); // a recording lasts until now
    const seconds = clamp(Math.max(width / (70 * unit), 8) / this.zoomed, 0.5, Math.max(duration + this.room, 2));
    const last = Math.max(duration + Math.min(this.room, 0.6 * seconds) - seconds, 0);
    if (this.following) {
      this.from = reducedMotion.matches
        ? Math.min(Math.floor(at / seconds) * seconds, duration)
        : clamp(at - 0.3 * seconds, 0, last);
    } else {
      this.from = clamp(this.from, 0, last);
    }
    const scale = width / seconds,
      row = height / this.span,
      { from, low } = this;
    const x = (time) => left + (time - from) * scale,
      y = (pitch) => height - (pitch - low) * row;
    return { left, width, height, seconds, from, scale, row, x, y, unit };
  }

  timeAt(clientX, at) {
    const f = this.frame(at);
    return f.from + (clientX - this.canvas.getBoundingClientRect().left - f.left) / f.scale;
  }

  zoom(factor) {
    this.zoomed = clamp(this.zoomed * factor, 1 / 32, 8);
  }

  scroll(seconds) {
    this.following = false;
    this.from += seconds;
  }

  draw(at) {
    const pen = fitCanvas(this.canvas),
      f = this.frame(at),
      sounding = new Map(this.lit);
    this.sounding = sounding; // pitch → voice
    this.drawRows(pen, f);
    pen.save();
    pen.beginPath();
    pen.rect(f.left, 0, f.width, f.height);
    pen.clip();
    this.drawMarks(pen, f);
    for (const ghost of this.ghosts) this.drawGhost(pen, f, ghost);
    this.drawNotes(pen, f, at, sounding);
    this.drawPoint(pen, f);
    pen.fillStyle = this.colours.ink;
    pen.fillRect(f.x(at) - 0.75, 0, 1.5, f.height);
    pen.restore();
    this.drawKeys(pen, f, sounding);
    this.drawTimes(pen, f);
  }

  drawRows(pen, f) {
    for (let key = Math.ceil(this.low); key < this.low + this.span; key++) {
      if (f.row >= 4 && isBlack(key)) {
        pen.fillStyle = this.colours.well;
        pen.fillRect(f.left, f.y(key) - f.row / 2, f.width, f.row);
      } else if (key % 12 === 0) {
        pen.fillStyle = this.colours.grid;
        pen.fillRect(f.left, Math.round(f.y(key) + f.row / 2), f.width, 1);
      }
    }
  }

  drawMarks(pen, f) {
    if (this.own) {
      pen.fillStyle = this.colours.validation;
      pen.globalAlpha = 0.07;
      pen.fillRect(f.x(this.own[0]), 0, (this.own[1] - this.own[0]) * f.scale, f.height);
      pen.globalAlpha = 1;
    }
    if (!this.passage) return;
    const [from, to] = this.passage.map(f.x);
    pen.fillStyle = this.colours.ink;
    pen.globalAlpha = 0.1;
    pen.fillRect(from, 0, to - from, f.height);
    pen.globalAlpha = 0.8;
    for (const edge of [from, to - 1.5]) pen.fillRect(edge, 0, 1.5, f.height);
    for (const edge of [from, to]) {
      pen.beginPath();
      pen.arc(edge, f.height / 2, 5, 0, 7);
      pen.fill();
    }
    pen.globalAlpha = 1;
  }

  drawPoint(pen, f) {
    if (this.point === null) return;
    const x = f.x(this.point);
    pen.fillStyle = this.colours.validation;
    pen.beginPath();
    pen.moveTo(x - 7, f.height);
    pen.lineTo(x + 7, f.height);
    pen.lineTo(x, f.height - 11);
    pen.fill();
  }

  drawGhost(pen, f, music) {
    const thick = Math.max(f.row * 0.35, 1);
    pen.fillStyle = this.colours.muted;
    pen.globalAlpha = 0.22;
    for (const i of music.between(f.from, f.from + f.seconds)) {
      const width = Math.max((music.end[i] - music.onset[i]) * f.scale - 1, 1);
      pen.fillRect(f.x(music.onset[i]), f.y(music.pitch[i]) - thick / 2, width, thick);
    }
    pen.globalAlpha = 1;
  }

  drawNotes(pen, f, at, sounding) {
    const { colours, music } = this,
      thick = Math.max(f.row - 1, 1.5);
    const drawNote = (onset, end, pitch, velocity, voice) => {
      const now = onset <= at && (end === null || at < end),
        width = Math.max(((end ?? at) - onset) * f.scale - 1, 1.5);
      pen.fillStyle = voice ? colours.validation : colours.train;
      pen.globalAlpha = now ? 1 : strength(velocity);
      if (now) sounding.set(pitch, voice);
      const grown = now ? Math.min(1.5, f.row / 4) : 0,
        height = thick + 2 * grown;
      pen.beginPath();
      if (height > 4 && width > 3) pen.roundRect(f.x(onset), f.y(pitch) - height / 2, width, height, 2);
      else pen.rect(f.x(onset), f.y(pitch) - height / 2, width, height);
      pen.fill();
    };
    for (const i of music.between(f.from, f.from + f.seconds)) {
      drawNote(music.onset[i], music.end[i], music.pitch[i], music.velocity[i], music.voice[i]);
    }
    for (const row of this.fresh) drawNote(...row);
    pen.globalAlpha = 1;
  }

  // The keyboard at the left; sounding keys are coloured by voice.
  drawKeys(pen, f, sounding) {
    const { colours } = this,
      edge = f.left - 4,
      wide = f.left >= 50 ? 26 * f.unit : 18,
      first = Math.ceil(this.low);
    const colourOf = (key, plain) =>
      sounding.has(key) ? (sounding.get(key) ? colours.validation : colours.train) : plain;
    const keys = Array.from({ length: Math.ceil(this.low + this.span) - first }, (_, i) => first + i);
    pen.fillStyle = colours.ivory;
    pen.fillRect(edge - wide, 0, wide, f.height);
    for (const key of keys.filter((each) => !isBlack(each))) {
      // A white key is wider than its row where it has a black neighbour.
      const top = f.y(key) - f.row * (isBlack(key + 1) ? 1 : 0.5),
        bottom = f.y(key) + f.row * (isBlack(key - 1) ? 1 : 0.5);
      pen.fillStyle = colourOf(key, colours.ivory);
      if (sounding.has(key)) pen.fillRect(edge - wide, top, wide, bottom - top);
      pen.fillStyle = colours.base;
      if (f.row >= 3) pen.fillRect(edge - wide, Math.round(top), wide, 0.5);
    }
    for (const key of keys.filter(isBlack)) {
      pen.fillStyle = colourOf(key, colours.ebony);
      pen.fillRect(edge - wide, f.y(key) - f.row / 2, wide * 0.62, Math.max(f.row - 0.5, 1));
    }
    pen.fillStyle = colours.base;
    pen.fillRect(edge, 0, 1, f.height);
    this.drawNames(pen, f, edge - wide - 3, keys);
  }

  drawNames(pen, f, right, keys) {
    pen.fillStyle = this.colours.muted;
    pen.font = `${11 * f.unit}px system-ui, sans-serif`;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const key of keys)
      if (key % 12 === 0) pen.fillText(`C${key / 12 - 1}`, right, clamp(f.y(key), 7, f.height - 6));
  }

  drawTimes(pen, f) {
    const { colours } = this,
      start = this.start + f.from;
    pen.fillStyle = colours.base;
    pen.fillRect(f.left, Math.round(f.height), f.width, 1);
    const step = CLOCK_STEPS.find((candidate) => candidate * f.scale >= 64 * f.unit) || 3600;
    pen.font = `${12 * f.unit}px system-ui, sans-serif`;
    pen.textBaseline = "middle";
    pen.textAlign = "center";
    for (let i = Math.ceil(start / step - 1e-6); i * step <= start + f.seconds; i++) {
      const at = f.x(i * step - this.start),
        label = clock(i * step, step < 1 ? 1 : 0);
      pen.fillStyle = colours.base;
      pen.fillRect(Math.round(at), f.height, 1, 4);
      pen.fillStyle = colours.muted;
      const half = pen.measureText(label).width / 2;
      pen.fillText(label, clamp(at, f.left + half - 4, f.left + f.width - half), f.height + 12 * f.unit);
    }
  }
}

// The whole piece in a strip, with the section that the roll shows.
export class Overview {
  constructor(canvas, roll) {
    Object.assign(this, { canvas, roll, picture: null, drawn: null, time: -Infinity, duration: 1 });
  }

  // A picture of the notes, made once for each music, size and colour scheme.
  drawPicture() {
    const { canvas, roll } = this,
      { music, colours } = roll,
      ratio = window.devicePixelRatio || 1;
    const picture = document.createElement("canvas"),
      scale = this.scale(),
      row = (canvas.clientHeight - 10) / roll.span;
    Object.assign(picture, { width: canvas.width, height: canvas.height });
    const pen = picture.getContext("2d");
    pen.scale(ratio, ratio);
    for (let i = 0; i < music.count; i++) {
      pen.fillStyle = music.voice[i] ? colours.validation : colours.train;
      pen.globalAlpha = 0.3 + (0.6 * music.velocity[i]) / 127;
      const top = canvas.clientHeight - 5 - (music.pitch[i] - roll.low) * row;
      pen.fillRect(
        music.onset[i] * scale,
        top,
        Math.max((music.end[i] - music.onset[i]) * scale, 0.6),
        Math.max(row, 1),
      );
    }
    this.duration = music.duration || 1;
    return picture;
  }

  scale() {
    return this.canvas.clientWidth / (this.roll.music.duration || 1);
  }

  timeAt(clientX) {
    const box = this.canvas.getBoundingClientRect();
    return ((clientX - box.left) / box.width) * this.roll.music.duration;
  }

  draw(at) {
    const { canvas, roll } = this,
      pen = fitCanvas(canvas),
      f = roll.frame(at),
      { width, height } = canvas;
    const key = [roll.music, width, height, roll.colours],
      now = performance.now();
    const changed = !this.drawn || key.some((value, i) => value !== this.drawn[i]);
    if (changed && (!roll.music.growing || !roll.music.count || now - this.time > PICTURE_PERIOD)) {
      [this.picture, this.drawn, this.time] = [this.drawPicture(), key, now];
    }
    const scale = this.scale();
    pen.fillStyle = roll.colours.ink;
    pen.globalAlpha = 0.1;
    pen.fillRect(f.from * scale, 0, Math.min(f.seconds, roll.music.duration) * scale, canvas.clientHeight);
    if (roll.passage)
      pen.fillRect(roll.passage[0] * scale, 0, (roll.passage[1] - roll.passage[0]) * scale, canvas.clientHeight);
    pen.globalAlpha = 1;
    if (width && height && this.picture) pen.drawImage(this.picture, 0, 0, this.duration * scale, canvas.clientHeight);
    pen.fillStyle = roll.colours.ink;
    pen.fillRect(clamp(at * scale - 1, 0, canvas.clientWidth - 2), 0, 2, canvas.clientHeight);
  }
}
