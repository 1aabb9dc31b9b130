"use strict";
// Plays and draws the notes of the page. The sound is additive synthesis; nothing is fetched.
(() => {
  const AHEAD = 0.4, AHEAD_HIDDEN = 1.6; // seconds scheduled ahead; the timer of a hidden page fires once a second
  const SLICE = 100; // milliseconds between two runs of the scheduler
  const LEAD = 0.06; // seconds from the button to the first sound
  const VOICES = 64; // at once, as many as a phone can play
  const TAIL = 1.0; // seconds after the last note
  const RATE = 32000; // Hz, of the string samples
  const SHADES = 8;
  const STEP = 5, LEAP = 30; // seconds, for the arrow keys and the page keys
  const CLOCK_STEPS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600];

  const byId = (id) => document.getElementById(id);
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const piece = readPiece(JSON.parse(byId("notes").textContent));
  const { count, onset, end, pitch, velocity, reach, duration } = piece;

  // Each note is stored as milliseconds since the previous onset, milliseconds of length, pitch and velocity.
  function readPiece(stored) {
    const count = stored.pitch.length;
    const onset = new Float64Array(count), end = new Float64Array(count), reach = new Float64Array(count);
    let time = 0, last = 0;
    for (let i = 0; i < count; i++) {
      time += stored.wait[i];
      onset[i] = time / 1000;
      end[i] = (time + stored.length[i]) / 1000;
      last = reach[i] = Math.max(last, end[i]); // the latest end of all notes so far
    }
    return { count, onset, end, reach, duration: last, start: stored.start, pitch: stored.pitch, velocity: stored.velocity };
  }

  // Index of the first value above a limit in an ascending array.
  function firstAbove(values, limit) {
    let low = 0, high = count;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (values[middle] > limit) high = middle; else low = middle + 1;
    }
    return low;
  }

  function clock(seconds, decimals = 0) {
    const scale = 10 ** decimals, units = Math.floor(seconds * scale + 1e-6);
    const whole = Math.floor(units / scale), minutes = Math.floor(whole / 60) % 60, hours = Math.floor(whole / 3600);
    const two = (n) => String(n).padStart(2, "0");
    const rest = decimals ? `.${String(units % scale).padStart(decimals, "0")}` : "";
    return `${hours ? `${hours}:${two(minutes)}` : minutes}:${two(whole % 60)}${rest}`;
  }

  // Samples (L,) of a piano string, at most about 1: partials a little sharp, each with its own decay, and hammer noise.
  const strings = new Map();
  function string(key) {
    if (strings.has(key)) return strings.get(key);
    const frequency = 440 * 2 ** ((key - 69) / 12), sustain = clamp(3.2 * 2 ** ((45 - key) / 20), 0.25, 4);
    const samples = new Float32Array(Math.round(RATE * clamp(2.5 * sustain, 0.8, 6)));
    for (let k = 1; k <= 18; k++) {
      const sharp = k * frequency * Math.sqrt(1 + 0.0004 * k * k);
      if (sharp > 0.4 * RATE) break;
      const strength = Math.abs(Math.sin((Math.PI * k) / 7.3)) / k ** 1.15;
      const fast = Math.exp(-1 / (RATE * sustain * 0.22 / (1 + 0.25 * k)));
      const slow = Math.exp(-1 / (RATE * sustain / (1 + 0.12 * k)));
      const angle = (2 * Math.PI * sharp) / RATE, turn = 2 * Math.cos(angle);
      let before = -Math.sin(angle), now = 0, quick = 0.65 * strength, lasting = 0.35 * strength;
      for (let i = 0; i < samples.length; i++) {
        samples[i] += now * (quick + lasting);
        const next = turn * now - before;
        before = now;
        now = next;
        quick *= fast;
        lasting *= slow;
      }
    }
    let noise = 0, seed = key + 1;
    const attack = 0.002 * RATE, fade = 0.05 * RATE;
    for (let i = 0; i < samples.length; i++) {
      if (i < 0.03 * RATE) {
        seed = (seed * 16807) % 2147483647;
        noise += 0.25 * (seed / 1073741824 - 1 - noise);
        samples[i] += 0.12 * noise * (1 - i / (0.03 * RATE));
      }
      samples[i] *= Math.min(1, i / attack, (samples.length - i) / fade) * 0.8;
    }
    strings.set(key, samples);
    return samples;
  }

  const sampledKey = (key) => Math.round(key / 3) * 3; // every third key; its neighbours resample it

  // Compute the strings that the piece needs, one at a time while the page is idle.
  function prepare(keys = [...new Set(pitch.map(sampledKey))]) {
    if (!keys.length) return;
    string(keys[0]);
    setTimeout(prepare, 20, keys.slice(1));
  }

  class Piano {
    constructor(context) {
      this.context = context;
      this.buffers = new Map();
      this.voices = [];
      this.volume = context.createGain();
      const limiter = context.createDynamicsCompressor();
      limiter.threshold.value = -12; // dB
      this.volume.connect(limiter);
      limiter.connect(context.destination);
    }

    setVolume(value) {
      this.volume.gain.setTargetAtTime(0.7 * value * value, this.context.currentTime, 0.02);
    }

    buffer(key) {
      if (!this.buffers.has(key)) {
        const samples = string(key), buffer = this.context.createBuffer(1, samples.length, RATE);
        buffer.getChannelData(0).set(samples);
        this.buffers.set(key, buffer);
      }
      return this.buffers.get(key);
    }

    // age: seconds since the note began, for a note that already sounds where playback starts.
    playNote(key, velocity, when, until, age = 0) {
      const buffer = this.buffer(sampledKey(key)), loudness = velocity / 127;
      if (age >= buffer.duration) return;
      this.makeRoom(when);
      const source = this.context.createBufferSource(), tone = this.context.createBiquadFilter();
      const gain = this.context.createGain();
      source.buffer = buffer;
      source.playbackRate.value = 2 ** ((key - sampledKey(key)) / 12);
      tone.type = "lowpass";
      tone.frequency.value = clamp(440 * 2 ** ((key - 69) / 12) * (1.5 + 12 * loudness * loudness), 300, 12000);
      gain.gain.setValueAtTime(0.6 * loudness ** 1.6, when);
      gain.gain.setTargetAtTime(0, until, 0.07); // the damper
      source.connect(tone);
      tone.connect(gain);
      gain.connect(this.volume);
      source.start(when, age);
      source.stop(until + 0.5);
      this.voices.push({ source, gain, until });
    }

    makeRoom(when) {
      this.voices = this.voices.filter((voice) => voice.until + 0.5 > this.context.currentTime);
      if (this.voices.length >= VOICES) this.silence(this.voices.shift(), when);
    }

    // 2 ms later, so that the start of a note that begins at `when` is not cancelled.
    silence(voice, when) {
      voice.gain.gain.cancelScheduledValues(when + 0.002);
      voice.gain.gain.setTargetAtTime(0, when + 0.002, 0.01);
      voice.source.stop(when + 0.08);
    }

    silenceAll() {
      for (const voice of this.voices) this.silence(voice, this.context.currentTime);
      this.voices = [];
    }
  }

  // The position in the music, from the audio clock while it plays.
  const transport = {
    piano: null, playing: false, rest: 0, anchor: 0, next: 0, timer: 0,

    position() {
      return this.playing ? this.piano.context.currentTime - this.anchor : this.rest;
    },

    shown() {
      const late = this.playing ? this.piano.context.outputLatency || 0 : 0;
      return clamp(this.position() - late, 0, duration);
    },

    openSound() {
      this.piano = new Piano(new (window.AudioContext || window.webkitAudioContext)());
      this.piano.setVolume(byId("volume").valueAsNumber);
      this.piano.context.onstatechange = () => {
        if (this.piano.context.state === "interrupted") this.pause(); // a phone call
      };
    },

    fail(error) {
      this.pause();
      byId("problem").textContent = `Cannot open the sound output: ${error.message}`;
    },

    play() {
      if (this.playing || !count) return;
      try {
        if (!this.piano) this.openSound();
      } catch (error) {
        this.fail(error);
        return;
      }
      this.piano.context.resume().catch((error) => this.fail(error));
      if (this.rest >= duration) this.rest = 0;
      this.playing = true;
      this.begin();
      this.timer = setInterval(() => this.schedule(), SLICE);
      refresh();
    },

    pause() {
      if (!this.playing) return;
      this.rest = clamp(this.position(), 0, duration);
      this.playing = false;
      clearInterval(this.timer);
      this.piano.silenceAll();
      refresh();
    },

    seek(seconds) {
      this.rest = clamp(seconds, 0, duration);
      if (this.playing) {
        this.piano.silenceAll();
        this.begin();
      }
      refresh();
    },

    begin() {
      this.anchor = this.piano.context.currentTime + LEAD - this.rest;
      this.next = firstAbove(onset, this.rest - 1e-6);
      const sounding = [];
      for (let i = firstAbove(reach, this.rest); i < this.next; i++) if (end[i] > this.rest) sounding.push(i);
      for (const i of sounding.slice(-VOICES)) this.playNote(i, this.rest - onset[i]);
      this.schedule();
    },

    // Schedules the next notes only; twenty thousand at once would block the page.
    schedule() {
      const limit = this.position() + (document.hidden ? AHEAD_HIDDEN : AHEAD);
      let played = 0;
      for (; this.next < count && onset[this.next] <= limit; this.next++) {
        if (played++ < 2 * VOICES) this.playNote(this.next);
      }
      if (this.position() > duration + TAIL) this.pause();
    },

    playNote(i, age = 0) {
      const now = this.piano.context.currentTime, when = Math.max(this.anchor + onset[i] + age, now);
      if (this.anchor + end[i] > now) this.piano.playNote(pitch[i], velocity[i], when, this.anchor + end[i], age);
    },
  };

  const view = { zoom: 1, colours: {}, background: null };
  const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");

  function readColours() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["ink", "muted", "grid", "base", "train", "validation", "well"]) {
      view.colours[name] = style.getPropertyValue(`--${name}`).trim();
    }
  }

  // Resize a canvas to its size on the screen. Returns its drawing context in CSS pixels.
  function fitCanvas(canvas) {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
    return pen;
  }

  const lowest = pitch.reduce((a, b) => Math.min(a, b), count ? 127 : 60);
  const highest = pitch.reduce((a, b) => Math.max(a, b), count ? 0 : 60);
  const spare = Math.max(24 - (highest - lowest), 4) / 2;
  const low = lowest - spare, span = highest - lowest + 2 * spare;

  // The section that the roll shows: it scrolls with the music, or turns pages if the user prefers reduced motion.
  function frame() {
    const roll = byId("roll"), left = 34, bottom = 20;
    const width = roll.clientWidth - left, height = roll.clientHeight - bottom;
    const seconds = clamp(Math.max(width / 70, 8) / view.zoom, 0.5, Math.max(duration, 2)), at = transport.shown();
    const last = Math.max(duration - seconds, 0);
    const from = reducedMotion.matches
      ? Math.min(Math.floor(at / seconds) * seconds, duration)
      : clamp(at - 0.3 * seconds, 0, last);
    return { left, width, height, seconds, from, scale: width / seconds, row: height / span };
  }

  function drawRoll() {
    const pen = fitCanvas(byId("roll")), { colours } = view, f = frame(), at = transport.shown();
    const y = (key) => f.height - (key - low) * f.row;
    const x = (seconds) => f.left + (seconds - f.from) * f.scale;
    drawGrid(pen, f, x, y);
    pen.save();
    pen.beginPath();
    pen.rect(f.left, 0, f.width, f.height);
    pen.clip();
    const thick = Math.max(f.row - 1, 1.5);
    const stop = firstAbove(onset, f.from + f.seconds);
    for (let i = firstAbove(reach, f.from); i < stop; i++) {
      if (end[i] <= f.from) continue;
      const sounding = onset[i] <= at && at < end[i];
      pen.fillStyle = sounding ? colours.validation : colours.train;
      const strength = 0.3 + (0.7 * Math.floor((velocity[i] * SHADES) / 128)) / (SHADES - 1);
      pen.globalAlpha = sounding ? Math.max(strength, 0.8) : strength;
      pen.fillRect(x(onset[i]), y(pitch[i]) - thick / 2, Math.max((end[i] - onset[i]) * f.scale - 1, 1.5), thick);
    }
    pen.restore();
    pen.fillStyle = colours.validation;
    pen.fillRect(x(at) - 0.75, 0, 1.5, f.height);
  }

  function drawGrid(pen, f, x, y) {
    const { colours } = view;
    pen.font = "12px system-ui, sans-serif";
    pen.textBaseline = "middle";
    for (let key = Math.ceil(low / 12) * 12; key < low + span; key += 12) {
      pen.fillStyle = colours.grid;
      pen.fillRect(f.left, Math.round(y(key)), f.width, 1);
      pen.fillStyle = colours.muted;
      pen.textAlign = "right";
      pen.fillText(`C${key / 12 - 1}`, f.left - 8, y(key));
    }
    pen.fillStyle = colours.base;
    pen.fillRect(f.left, Math.round(f.height), f.width, 1);
    const start = piece.start + f.from;
    const step = CLOCK_STEPS.find((candidate) => candidate * f.scale >= 64) || 3600;
    pen.textAlign = "center";
    for (let i = Math.ceil(start / step - 1e-6); i * step <= start + f.seconds; i++) {
      const at = x(i * step - piece.start), label = clock(i * step, step < 1 ? 1 : 0);
      pen.fillStyle = colours.base;
      pen.fillRect(Math.round(at), f.height, 1, 4);
      pen.fillStyle = colours.muted;
      const half = pen.measureText(label).width / 2;
      pen.fillText(label, clamp(at, f.left, f.left + f.width - half), f.height + 12);
    }
  }

  // A picture of the whole piece, made once for each size and colour scheme.
  function drawBackground(canvas) {
    const { colours } = view, scale = canvas.clientWidth / (duration || 1), row = (canvas.clientHeight - 10) / span;
    const picture = document.createElement("canvas");
    Object.assign(picture, { width: canvas.width, height: canvas.height });
    const pen = picture.getContext("2d"), ratio = window.devicePixelRatio || 1;
    pen.scale(ratio, ratio);
    pen.fillStyle = colours.train;
    for (let i = 0; i < count; i++) {
      pen.globalAlpha = 0.3 + (0.6 * velocity[i]) / 127;
      const top = canvas.clientHeight - 5 - (pitch[i] - low) * row;
      pen.fillRect(onset[i] * scale, top, Math.max((end[i] - onset[i]) * scale, 0.6), Math.max(row, 1));
    }
    return picture;
  }

  function drawOverview() {
    const canvas = byId("overview"), pen = fitCanvas(canvas), { colours } = view, f = frame();
    const { width, height } = canvas;
    if (!view.background || view.background.width !== width || view.background.height !== height) {
      view.background = drawBackground(canvas);
    }
    const scale = canvas.clientWidth / (duration || 1);
    pen.fillStyle = colours.ink;
    pen.globalAlpha = 0.1;
    pen.fillRect(f.from * scale, 0, Math.min(f.seconds, duration) * scale, canvas.clientHeight);
    pen.globalAlpha = 1;
    if (width && height) pen.drawImage(view.background, 0, 0, canvas.clientWidth, canvas.clientHeight);
    pen.fillStyle = colours.validation;
    pen.fillRect(clamp(transport.shown() * scale - 1, 0, canvas.clientWidth - 2), 0, 2, canvas.clientHeight);
  }

  let pending = false;
  function refresh() {
    if (pending) return;
    pending = true;
    requestAnimationFrame(() => {
      pending = false;
      draw();
      if (transport.playing) refresh();
    });
  }

  function setAttribute(node, key, value) {
    if (node.getAttribute(key) !== value) node.setAttribute(key, value);
  }

  function draw() {
    drawRoll();
    drawOverview();
    const now = clock(piece.start + transport.shown()), all = clock(piece.start + duration);
    const label = `${now} / ${all}`, time = byId("time"), play = byId("play"), slider = byId("overview");
    if (time.textContent !== label) time.textContent = label;
    setAttribute(slider, "aria-valuenow", String(Math.floor(transport.shown())));
    setAttribute(slider, "aria-valuetext", `${now} of ${all}`);
    play.toggleAttribute("data-playing", transport.playing);
    setAttribute(play, "aria-label", transport.playing ? "Pause" : "Play");
  }

  function zoom(factor) {
    view.zoom = clamp(view.zoom * factor, 1 / 16, 8);
    refresh();
  }

  function onKey(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const on = event.target.tagName, at = transport.shown();
    const moves = { ArrowLeft: at - STEP, ArrowRight: at + STEP, Home: 0, End: duration };
    if (event.target === byId("overview")) {
      Object.assign(moves, { ArrowDown: at - STEP, ArrowUp: at + STEP });
      Object.assign(moves, { PageDown: at - LEAP, PageUp: at + LEAP });
    }
    if (event.key === " " && on !== "BUTTON" && on !== "SUMMARY") {
      if (!event.repeat) toggle();
    } else if (event.key in moves && on !== "INPUT") {
      transport.seek(moves[event.key]);
    } else if (event.key === "+" || event.key === "-") {
      zoom(event.key === "+" ? Math.SQRT2 : Math.SQRT1_2);
    } else {
      return;
    }
    event.preventDefault();
  }

  function toggle() {
    if (transport.playing) transport.pause(); else transport.play();
  }

  function listen() {
    const overview = byId("overview"), roll = byId("roll");
    const drag = (event) => {
      const box = overview.getBoundingClientRect();
      transport.seek(((event.clientX - box.left) / box.width) * duration);
    };
    overview.addEventListener("pointerdown", (event) => {
      overview.setPointerCapture(event.pointerId);
      drag(event);
    });
    overview.addEventListener("pointermove", (event) => {
      if (overview.hasPointerCapture(event.pointerId)) drag(event);
    });
    roll.addEventListener("click", (event) => {
      const f = frame(), x = event.clientX - roll.getBoundingClientRect().left - f.left;
      if (x >= 0) transport.seek(f.from + x / f.scale);
    });
    byId("play").addEventListener("click", toggle);
    byId("closer").addEventListener("click", () => zoom(Math.SQRT2));
    byId("wider").addEventListener("click", () => zoom(Math.SQRT1_2));
    byId("volume").addEventListener("input", (event) => {
      if (transport.piano) transport.piano.setVolume(event.target.valueAsNumber);
    });
    document.addEventListener("keydown", onKey);
    document.addEventListener("visibilitychange", () => {
      if (transport.playing) transport.schedule();
    });
    const recolour = () => {
      readColours();
      view.background = null;
      refresh();
    };
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
    reducedMotion.addEventListener("change", refresh);
    new ResizeObserver(refresh).observe(roll);
  }

  function begin() {
    readColours();
    listen();
    const problem = byId("problem");
    if (!count) problem.textContent = "There are no notes.";
    else if (!window.AudioContext && !window.webkitAudioContext) problem.textContent = "This browser has no Web Audio.";
    byId("play").disabled = Boolean(problem.textContent);
    refresh();
    setTimeout(prepare, 200);
  }

  begin();
})();
