// Plays a Music that may still grow: the position comes from the audio clock, notes are scheduled shortly before
// they sound.
import { clamp, firstAbove, Music } from "./music.js";
import { Piano, samples, VOICES } from "./piano.js";
import { RATE } from "./strings.js";

const AHEAD = 0.4,
  AHEAD_HIDDEN = 1.6; // seconds scheduled ahead; the timer of a hidden page fires once a second
const PERIOD = 100; // milliseconds between two runs of the scheduler
const LEAD = 0.06; // seconds from the button to the first sound
const TAIL = 1.0; // seconds after the last note
const MIN_BUFFER = 0.5; // seconds of finished music that playback needs ahead
const COMING = 6; // seconds of music whose samples are computed first

export class Transport {
  // onChange: called when it starts, stops, waits or moves. onFail: called with a line of text.
  constructor({ onChange, onFail }) {
    Object.assign(this, { onChange, onFail, music: new Music(), piano: null, volume: 0.8 });
    Object.assign(this, {
      playing: false,
      waiting: false,
      rest: 0,
      anchor: 0,
      done: 0,
      timer: 0,
      buffer: MIN_BUFFER,
      since: null,
      speed: null,
    });
    this.open = []; // notes that sound while their end is not known yet
    this.remote = false; // a MIDI output plays: keep time, make no sound
  }

  get now() {
    return this.remote || !this.piano ? performance.now() / 1000 : this.piano.context.currentTime;
  }

  get duration() {
    return this.music.duration;
  }

  position() {
    return this.playing && !this.waiting ? this.now - this.anchor : this.rest;
  }

  shown() {
    const late = this.playing && !this.waiting && !this.remote ? this.piano.context.outputLatency || 0 : 0;
    return clamp(this.position() - late, 0, this.duration);
  }

  // Must be called from a key or a click: browsers allow sound only then. Returns whether there is a piano.
  openSound() {
    try {
      if (!this.piano) {
        const Context = window.AudioContext || window.webkitAudioContext;
        if (!Context) throw new Error("this browser has no Web Audio");
        this.piano = new Piano(new Context({ latencyHint: "interactive", sampleRate: RATE }));
        this.piano.setVolume(this.volume);
        this.piano.context.onstatechange = () => {
          if (this.piano.context.state === "interrupted") this.pause(); // a phone call
        };
      }
      if (this.piano.context.state !== "running") this.piano.context.resume().catch((error) => this.fail(error));
    } catch (error) {
      this.fail(error);
    }
    return Boolean(this.piano);
  }

  fail(error) {
    this.pause();
    this.onFail(`Cannot open the sound output: ${error.message}`);
  }

  setVolume(value) {
    this.volume = value;
    if (this.piano) this.piano.setVolume(value);
  }

  play() {
    if (this.playing || (!this.music.count && !this.music.growing)) return;
    if (!this.remote && !this.openSound()) return;
    if (this.rest >= this.duration && !this.music.growing) this.rest = 0;
    this.playing = true;
    this.begin();
    this.timer = setInterval(() => this.schedule(), PERIOD);
    this.onChange();
  }

  pause() {
    if (!this.playing) return;
    this.rest = clamp(this.position(), 0, this.duration);
    this.playing = this.waiting = false;
    clearInterval(this.timer);
    this.quiet();
    this.onChange();
  }

  toggle() {
    if (this.playing) this.pause();
    else this.play();
  }

  seek(seconds) {
    this.rest = clamp(seconds, 0, this.duration);
    if (this.playing) {
      this.quiet();
      this.begin();
    }
    this.onChange();
  }

  quiet() {
    this.open = [];
    if (this.piano) this.piano.silenceAll();
  }

  // Replace the music. same: the same music with more notes, so that playback continues.
  setMusic(music, same = false) {
    this.measure(music, same);
    this.music = music;
    if (!same && this.playing) this.seek(Math.min(this.position(), this.duration));
    else if (!this.playing) this.rest = clamp(this.rest, 0, this.duration);
    else this.schedule();
    if (!this.playing) this.prepare(this.rest);
  }

  // Seconds of music made a second, null while it is unknown.
  measure(music, same) {
    const now = performance.now() / 1000;
    if (!music.growing || !same || !this.since || music.made <= this.since.made)
      this.since = { time: now, made: music.made };
    const seconds = now - this.since.time;
    this.speed = music.growing && seconds >= 0.5 ? (music.made - this.since.made) / seconds : null;
    if (!music.growing || !same) this.buffer = MIN_BUFFER;
  }

  // Seconds of finished music after the playhead.
  get ahead() {
    return this.music.growing ? Math.max(this.music.made - this.position(), 0) : Infinity;
  }

  prepare(from) {
    const { onset, pitch } = this.music;
    samples.prepare(pitch.subarray(firstAbove(onset, from - 1e-6), firstAbove(onset, from + COMING)));
  }

  begin() {
    this.waiting = !this.buffered(this.rest);
    this.anchor = this.now + LEAD - this.rest;
    this.done = this.rest - 1e-6;
    this.prepare(this.rest);
    if (!this.waiting) this.resumeSounding();
    this.schedule();
  }

  // Notes that already sound where playback starts.
  resumeSounding() {
    const { music, rest } = this,
      sounding = [];
    for (const i of music.between(rest, rest + 1e-6)) if (music.onset[i] < rest - 1e-6) sounding.push(i);
    for (const i of sounding.slice(-VOICES)) this.playNote(i, rest - music.onset[i]);
    if (this.piano && !this.remote) {
      const last = firstAbove(music.pedalTimes, rest) - 1;
      this.piano.setResonance(last >= 0 && music.pedal[last][1] >= 64, this.now);
    }
  }

  buffered(at) {
    return !this.music.growing || this.music.made - at >= this.buffer;
  }

  // Schedules the next notes only; twenty thousand at once would block the page.
  schedule() {
    if (this.waiting) {
      if (!this.buffered(this.rest)) return;
      this.waiting = false;
      this.anchor = this.now + LEAD - this.rest;
      this.done = this.rest - 1e-6;
      this.resumeSounding();
      this.onChange();
    }
    const { music } = this,
      at = this.position();
    if (music.growing && at >= music.made) return this.wait();
    const limit = Math.min(at + (document.hidden ? AHEAD_HIDDEN : AHEAD), music.made);
    this.scheduleBetween(this.done, limit);
    this.done = Math.max(this.done, limit);
    this.releaseOpen();
    if (!music.growing && at > music.duration + TAIL) this.pause();
  }

  scheduleBetween(from, to) {
    const { music } = this,
      stop = firstAbove(music.onset, to);
    let played = 0;
    for (let i = firstAbove(music.onset, from); i < stop; i++) if (played++ < 2 * VOICES) this.playNote(i);
    if (!this.piano || this.remote) return;
    const last = firstAbove(music.pedalTimes, to);
    for (let i = firstAbove(music.pedalTimes, from); i < last; i++) {
      this.piano.setResonance(music.pedal[i][1] >= 64, Math.max(this.anchor + music.pedal[i][0], this.now));
    }
    this.prepare(to);
  }

  // Playback has reached the end of the finished music: wait until enough is ready that it does not stop again at once.
  wait() {
    this.buffer = this.speed === null || this.speed >= 1 ? MIN_BUFFER : clamp(1 + 6 * (1 - this.speed), 1, 6);
    this.rest = this.music.made;
    this.waiting = true;
    this.quiet();
    this.onChange();
  }

  playNote(i, age = 0) {
    if (this.remote) return;
    const { music, now } = this,
      { onset, end, pitch, velocity } = music;
    const when = Math.max(this.anchor + onset[i] + age, now),
      held = end[i] >= music.made - 1e-3;
    const until = held ? Infinity : this.anchor + end[i];
    if (until <= now) return;
    const voice = this.piano.play(pitch[i], velocity[i], when, until, age);
    if (held && voice) this.open.push({ voice, onset: onset[i], pitch: pitch[i] });
  }

  // Notes that were held when they were scheduled: release them once their end is known.
  releaseOpen() {
    const { music } = this;
    this.open = this.open.filter(({ voice, onset, pitch }) => {
      let end = null;
      for (let i = firstAbove(music.onset, onset - 2e-3); i < music.count && music.onset[i] < onset + 2e-3; i++) {
        if (music.pitch[i] === pitch) end = music.end[i];
      }
      if (end !== null && end >= music.made - 1e-3) return true;
      this.piano.release(voice, Math.max(this.anchor + (end ?? 0), this.now));
      return false;
    });
  }
}
