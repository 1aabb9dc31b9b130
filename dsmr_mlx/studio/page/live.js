// The current recording or duet, which provides the roll's music and playhead while it lasts.
import { Music } from "/shared/music.js";

const AHEAD = 2; // seconds that the playhead may be ahead of the studio's last message

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

  // The take has grown during a duet.
  grown(end) {
    [this.end, this.heard] = [end, this.now()];
  }

  // The current music and position. music: of the selected take.
  frame(music) {
    if (this.kind === "duet") return { music, at: Math.min(this.end + this.now() - this.heard, this.end + AHEAD) };
    const at = this.begun ? this.now() - this.begun : 0;
    return { music: new Music(this.rows.map(([onset, end, ...rest]) => [onset, end ?? at, ...rest])), at };
  }
}
