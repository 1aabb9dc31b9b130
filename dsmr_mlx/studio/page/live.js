// The current recording or duet, which provides the roll's music and playhead while it lasts.
import { Music } from "/shared/music.js";
import { Joined } from "./session.js";

const AHEAD = 2; // seconds that the playhead may be ahead of the studio's last message
const PERIOD = 0.5; // seconds between two pieces of music made of a recording

export class Live {
  constructor() {
    Object.assign(this, { kind: null, lit: new Map() });
    this.clear();
  }

  get on() {
    return this.kind !== null;
  }

  // kind: "listen", "duet" or null
  set(kind) {
    if (kind === this.kind) return;
    this.kind = kind;
    this.clear();
    this.lit.clear();
  }

  // rows: [onset, end, pitch, velocity, voice], end null while the key is down. fresh: those that `music` lacks.
  clear() {
    Object.assign(this, {
      rows: [],
      fresh: [],
      music: new Music([], { made: 0 }),
      begun: 0,
      end: 0,
      heard: this.now(),
    });
  }

  now() {
    return performance.now() / 1000;
  }

  // time: in the take, or undefined for a key of this page.
  key(pitch, velocity, voice, time) {
    if (velocity) this.lit.set(pitch, voice);
    else this.lit.delete(pitch);
    if (this.kind !== "listen") return;
    if (!this.begun && !velocity) return;
    if (time !== undefined) this.begun = this.now() - time;
    else if (!this.begun) this.begun = this.now();
    const at = this.now() - this.begun;
    for (const row of this.fresh) if (row[1] === null && row[2] === pitch) row[1] = at;
    if (!velocity) return;
    const row = [at, null, pitch, velocity, voice];
    this.rows.push(row);
    this.fresh = [...this.fresh, row];
  }

  // The take has grown during a duet.
  grown(end) {
    [this.end, this.heard] = [end, this.now()];
  }

  // The current music, the rows that it lacks yet, and the position. music: of the selected take.
  frame(music) {
    const { fresh } = this;
    if (this.kind === "duet")
      return { music, fresh, at: Math.min(this.end + this.now() - this.heard, this.end + AHEAD) };
    const at = this.begun ? this.now() - this.begun : 0;
    if (at - this.music.made >= PERIOD && fresh.some((row) => row[1] !== null)) {
      const ended = fresh.filter((row) => row[1] !== null);
      this.music = new Joined(this.music, ended, new Music(), { made: at });
      this.fresh = fresh.filter((row) => row[1] === null);
    }
    return { music: this.music, fresh: this.fresh, at };
  }
}
