// What is played now: a recording, or a duet. It gives the roll its music and its playhead while they last.
import { Music } from "/shared/music.js";

const AHEAD = 2; // seconds that the playhead may be ahead of the last word from the studio

export class Live {
  constructor() {
    Object.assign(this, { kind: null, rows: [], begun: 0, end: 0, heard: 0, lit: new Map() });
  }

  get on() {
    return this.kind !== null;
  }

  // kind: "listen", "duet" or null
  set(kind) {
    if (kind === this.kind) return;
    Object.assign(this, { kind, rows: [], begun: 0, end: 0, heard: this.now() });
    this.lit.clear();
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
    for (const row of this.rows) if (row[1] === null && row[2] === pitch) row[1] = at;
    if (velocity) this.rows.push([at, null, pitch, velocity, voice]);
  }

  // A take grows during a duet.
  grown(end) {
    [this.end, this.heard] = [end, this.now()];
  }

  // The music and the position of this moment. music: of the selected take.
  frame(music) {
    if (this.kind === "duet") return { music, at: Math.min(this.end + this.now() - this.heard, this.end + AHEAD) };
    const at = this.begun ? this.now() - this.begun : 0;
    return { music: new Music(this.rows.map(([onset, end, ...rest]) => [onset, end ?? at, ...rest])), at };
  }
}
