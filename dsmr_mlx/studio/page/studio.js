// The page of the studio: connects session, sound and display. docs/studio-protocol.md has the messages.
import { byId, clamp, clock, Music, setAttribute, setText, toThousandths } from "/shared/music.js";
import { samples } from "/shared/piano.js";
import { readColours, reducedMotion } from "/shared/piano_roll.js";
import { Transport } from "/shared/transport.js";
import { actions, KEY_LIST, listenToKeys } from "./commands.js";
import { closeDialog, exportDialog, helpDialog, leadDialog, sessionsDialog } from "./dialogs.js";
import { render } from "./display.js";
import { Files } from "./files.js";
import { Keyboard } from "./keyboard.js";
import { Live } from "./live.js";
import { NO_PORTS, Session } from "./session.js";
import { Settings } from "./settings.js";
import { Socket } from "./socket.js";
import { Stage } from "./stage.js";
import { Cards, Tree } from "./takes.js";

const PREROLL = 2; // seconds of existing music played before new music
const INSERTED = 8; // seconds of an insertion if no length is chosen
const DISCONNECTED = "Not connected: the studio does not answer";
const DUET_PAUSE = 1.2; // seconds of silence that end a turn

class Studio {
  constructor() {
    this.session = new Session();
    this.music = new Music(); // shown and played
    this.point = null; // where Continue starts; null: at the end
    this.making = null; // the request whose first take the page waits for
    this.wasOpen = false;
    this.live = new Live();
    this.pedals = { own: 0, heard: 0 };
    const changed = () => this.refresh();
    this.transport = new Transport({ onChange: changed, onFail: (text) => this.complain(text) });
    this.stage = new Stage({ seek: (time) => this.seek(time), changed, position: () => this.position() });
    this.cards = new Cards({ hear: (id) => this.hearTake(id), keep: (id, kept) => this.keep(id, kept) });
    this.tree = new Tree({
      select: (take) => this.select(take),
      rename: (take, name) => this.send({ type: "rename", take, name }),
    });
    this.keyboard = new Keyboard({
      press: (pitch, velocity) => this.press(pitch, velocity),
      lift: (pitch) => this.press(pitch, 0),
      pedal: (value) => this.pressPedal(value),
      changed,
    });
    this.settings = new Settings({
      set: (settings) => this.send({ type: "settings", settings, at: this.heardAt }),
      midi: (ports) => this.send({ type: "midi", ...ports }),
      webMidi: () => this.useWebMidi().catch((error) => `The browser refuses: ${error.message}`),
    });
    this.stage.setMusic(this.music);
    this.actions = actions(this);
    new Files({ send: (message) => this.send(message), complain: (text) => this.complain(text) });
    this.listen();
    this.socket = new Socket({
      onMessage: (message) => this.receive(message),
      onOpen: () => {
        this.wasOpen = true;
        this.complain("");
      },
      onClose: () => this.lost(),
      onRefused: () => this.complain("The studio was restarted: open the address that it has printed"),
    });
    setTimeout(() => samples.prepare([60, 57, 63, 54, 66, 69, 51, 48, 72, 45, 75, 42, 39, 36, 78]), 500);
    this.refresh();
  }

  // Messages

  receive(message) {
    const { session } = this;
    const handlers = {
      session: () => this.begin(message),
      take: () => session.setTake(message.take),
      notes: () => session.setNotes(message),
      selection: () => session.select(message),
      settings: () => (session.settings = message.settings),
      models: () => (session.models = message.models),
      status: () => (session.status = message),
      midi: () => this.changePorts(message),
      key: () => this.hearKey(message),
      pedal: () => this.movePedal({ heard: message.value }),
      playing: () => this.hearOutput(message),
      sessions: () => this.chooseSession(message.sessions),
      error: () => this.complain(message.message),
    };
    const growing = session.takes.get(message.take)?.growing;
    handlers[message.type]?.();
    if (message.type === "notes" && growing && this.live.kind === "duet") this.live.grown(message.end);
    if (message.type === "status") this.followActivity();
    if (["take", "notes", "selection", "session"].includes(message.type)) this.show();
    this.refresh();
  }

  begin(message) {
    if (message.name !== this.session.name) {
      this.transport.pause();
      this.transport.rest = 0;
      this.point = null;
      this.stage.mark(null);
    }
    this.changePorts({ ...NO_PORTS, ...message.ports });
    this.session.reset(message);
    this.shown = undefined;
    this.followActivity();
  }

  lost() {
    this.changePorts({ ...this.session.ports, input: null, output: null }); // the page makes the sound
    const idle = { activity: "idle", progress: null, takes: [], turn: null, recording: false };
    this.session.status = { ...this.session.status, ...idle };
    for (const take of this.session.takes.values()) if (take.growing) this.session.setTake({ ...take, growing: false });
    this.keyboard.releaseAll(); // the studio has released them too
    this.movePedal({ heard: 0 });
    this.live.set(null);
    this.making = null;
    this.show();
    this.refresh();
  }

  followActivity() {
    const { activity, recording } = this.session.status;
    this.live.set(recording ? "listen" : activity === "duet" ? "duet" : null);
    if (activity === "duet") this.live.grown(this.session.take?.end ?? 0);
  }

  // Show and play the selected take. Playback continues if the new music begins like the old.
  show() {
    const { session } = this,
      { selected } = session,
      switched = selected !== this.shown;
    if (this.making && switched && session.take?.growing) this.making.came = true;
    if (this.making && !this.making.came) return; // the existing music plays until the first take comes
    const music = session.music(selected);
    if (music === this.music) return void (this.shown = selected);
    if (switched) this.point = null;
    if (switched && !this.making && !this.transport.playing) this.transport.rest = 0;
    if (switched && session.take && session.take.parent !== null && !this.transport.playing) {
      this.transport.rest = Math.max(session.take.begin - PREROLL, 0);
    }
    this.shown = selected;
    this.music = music;
    this.transport.setMusic(music, !switched || Boolean(this.making));
    this.stage.roll.own = session.take && session.take.begin > 0 ? [session.take.begin, session.take.end] : null;
    this.stage.setMusic(music);
    if (switched && this.making?.came && this.output) this.playOnOutput();
  }

  // Another MIDI output, or none: playback stops, and starts there the next time.
  changePorts(ports) {
    if (ports.output !== this.output) this.transport.pause();
    if (ports.input !== null) this.keyboard.leaveWebMidi(); // the studio hears it
    this.session.ports = ports;
    this.transport.remote = ports.output !== null;
  }

  send(message) {
    if (!this.socket.send(message)) this.complain(DISCONNECTED);
  }

  async ask(message) {
    const answer = await this.socket.ask(message);
    if (answer === null) this.complain(DISCONNECTED);
    return answer;
  }

  complain(text) {
    const problem = byId("problem");
    problem.hidden = !text;
    setText(problem.firstChild, text);
  }

  // Playing

  get output() {
    return this.session.ports.output;
  }

  position() {
    return this.transport.shown();
  }

  // The position in a growing take that plays, from which new settings apply; null: they apply to music still to come.
  get heardAt() {
    return this.transport.playing && this.session.take?.growing ? this.position() : null;
  }

  togglePlay() {
    this.stage.roll.following = true;
    if (this.transport.playing) {
      this.transport.pause();
      const at = this.transport.rest;
      this.point = at >= this.music.duration - 0.05 ? null : toThousandths(at);
      if (this.output) this.send({ type: "stop_playing" });
    } else if (this.output) {
      this.playOnOutput();
    } else {
      this.transport.play();
    }
    this.refresh();
  }

  // A MIDI output plays; the page keeps time.
  playOnOutput() {
    const at = this.position();
    this.send({ type: "play", take: this.session.selected, at: at >= this.music.duration ? 0 : at });
    this.transport.play();
  }

  // What the MIDI output plays, which another page may have begun or ended.
  hearOutput({ at }) {
    const { transport } = this;
    if (!transport.remote) return;
    if (at === null) return transport.pause();
    transport.buffer = 0; // the studio waits for music itself
    transport.seek(at);
    transport.play();
  }

  // The user has chosen a point.
  seek(time) {
    const at = clamp(time, 0, this.transport.duration);
    this.point = at >= this.music.duration - 0.05 ? null : toThousandths(at);
    this.stage.roll.following = true;
    this.transport.seek(at);
    if (this.output && this.transport.playing) this.playOnOutput();
  }

  // Select a take at once; the studio confirms. The page then no longer waits for another take.
  async select(id) {
    const settle = this.session.selected === id ? null : this.session.choose(id);
    this.making = null;
    this.show();
    this.refresh();
    if (!settle) return;
    const answer = await this.ask({ type: "select", take: id });
    settle(answer !== null);
    this.show();
    this.refresh();
  }

  hear(number) {
    const take = this.cards.shown[number - 1];
    if (take) this.hearTake(take.id);
  }

  // Play one of the alternative takes from shortly before it begins.
  hearTake(id) {
    const take = this.session.takes.get(id);
    this.select(id);
    this.point = null;
    this.stage.roll.following = true;
    this.transport.seek(Math.max(take.begin - PREROLL / 2, 0));
    if (this.output) this.playOnOutput();
    else this.transport.play();
  }

  // Making music

  get amount() {
    const seconds = byId("seconds").value;
    return {
      seconds: seconds ? Number(seconds) : null,
      count: Number(document.querySelector('input[name="count"]:checked').value),
    };
  }

  async make(type, { fromNothing = false, to = null } = {}) {
    const { session, stage } = this,
      { seconds, count } = this.amount,
      { seed } = session.settings;
    const take = fromNothing || session.empty || session.take === null ? null : session.selected;
    const at = take === null ? 0 : type === "replace" ? stage.passage?.[0] : (this.point ?? this.music.duration);
    if (type !== "continue" && take === null) return;
    if (at === undefined) return this.complain("Mark a passage first: drag over the music, or press [ and ]");
    const message = { type, take, count, seed: seed ?? null };
    if (type === "replace") [message.start, message.end] = stage.passage;
    else
      [message.at, message.seconds] = [
        take === null || (this.point === null && type === "continue") ? null : at,
        seconds,
      ];
    if (type === "insert" || type === "lead") message.seconds = seconds ?? INSERTED;
    if (to !== null) message.to = to;
    const making = (this.making = { came: false });
    this.complain("");
    if (!this.output) this.preroll(take, at);
    const answer = await this.ask(message);
    if (this.making !== making) return;
    this.making = null;
    if (!answer || answer.type === "error" || !making.came) this.shown = undefined;
    if (answer?.type === "done" && answer.take !== null && type === "replace") stage.mark(null);
    this.show();
    this.refresh();
  }

  // Play the music before the join while the model reads it, so that new music follows without a pause.
  preroll(take, at) {
    const { transport, stage } = this;
    transport.pause();
    this.music = this.session.beginning(take, at);
    stage.roll.own = null;
    stage.roll.following = true;
    stage.setMusic(this.music);
    transport.rest = Math.max(at - PREROLL, 0);
    transport.setMusic(this.music);
    transport.play();
  }

  chooseLead() {
    const others = this.session.visible.filter(
      (take) => take.id !== this.session.selected && (take.parent === null ? take.end > 0 : take.kept),
    );
    leadDialog(others, (to) => this.make("lead", { to }));
  }

  stop() {
    if (byId("dialog").open) closeDialog();
    else if (this.live.on) this.live.kind === "duet" ? this.duet() : this.record();
    else if (this.session.status.activity !== "idle") this.send({ type: "stop" });
    else if (this.stage.passage) this.stage.mark(null);
    else if (this.stage.marking) this.stage.setMarking(false);
    else if (this.keyboard.open) this.keyboard.show(false);
    this.complain("");
  }

  keep(id, kept) {
    const take = this.session.takes.get(id);
    if (take) this.send({ type: "keep", take: id, kept: take.kept === kept ? null : kept });
  }

  // Live

  press(pitch, velocity) {
    if (this.transport.openSound() && !this.output) {
      if (velocity) this.transport.piano.press(pitch, velocity);
      else this.transport.piano.lift(pitch);
    }
    this.live.key(pitch, velocity, 0);
    this.socket.send({ type: "key", pitch, velocity });
    this.refresh();
  }

  pressPedal(value) {
    this.movePedal({ own: value });
    this.socket.send({ type: "pedal", value });
  }

  // own: the page's; heard: another client's or the MIDI input's.
  movePedal(pedals) {
    Object.assign(this.pedals, pedals);
    this.transport.piano?.setPedal(Math.max(this.pedals.own, this.pedals.heard));
  }

  hearKey({ pitch, velocity, voice, time }) {
    this.live.key(pitch, velocity, voice, time);
    if (this.output || !this.transport.piano) return;
    if (velocity) this.transport.piano.press(pitch, velocity);
    else this.transport.piano.lift(pitch);
  }

  // Choose the MIDI input if there is only one, but never use browser and studio at once.
  useOnlyInput() {
    const { input, output, inputs } = this.session.ports;
    if (input === null && inputs.length === 1 && !this.keyboard.webMidi)
      this.send({ type: "midi", input: inputs[0], output });
  }

  async useWebMidi() {
    const found = await this.keyboard.useWebMidi();
    if (this.session.ports.input !== null) this.send({ type: "midi", input: null, output: this.output });
    return found;
  }

  record() {
    const on = this.live.kind !== "listen";
    this.transport.pause();
    this.transport.openSound();
    if (on) this.useOnlyInput();
    this.ask({ type: "listen", on });
    if (on && !this.keyboard.open) this.keyboard.show(true);
  }

  duet() {
    const on = this.live.kind !== "duet",
      { session } = this;
    this.transport.pause();
    this.transport.openSound();
    if (on) this.useOnlyInput();
    this.ask({ type: "duet", on, take: on && !session.empty ? session.selected : null, pause: DUET_PAUSE });
    if (on && !this.keyboard.open) this.keyboard.show(true);
  }

  // Dialogs

  chooseSession(sessions) {
    sessionsDialog(sessions, this.session.name, {
      open: (name) => this.send({ type: "open", name }),
      create: (name) => this.send({ type: "new", name }),
      saveAs: (name) => this.send({ type: "save_as", name }),
      upload: () => byId("session-file").click(),
    });
  }

  chooseExport() {
    if (this.session.take) exportDialog(this.session.take, this.session.exports);
  }

  help() {
    helpDialog(KEY_LIST);
  }

  // Display

  // Redraw everything in the next frame.
  refresh() {
    this.stale = true;
    this.nextFrame();
  }

  nextFrame() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.drawMusic();
      if (this.stale) this.drawRest();
      this.stale = false;
      if (this.transport.playing || this.live.on) this.nextFrame();
    });
  }

  // Draw what moves with the playhead.
  drawMusic() {
    const { stage, live } = this,
      { roll } = stage;
    let at = this.position();
    if (live.on) {
      const frame = live.frame(this.music);
      at = frame.at;
      if (frame.music !== roll.music || frame.fresh !== roll.fresh) roll.setMusic(frame.music, frame.fresh);
      roll.following = true;
    } else if (roll.music !== this.music) {
      roll.setMusic(this.music);
    }
    roll.lit = live.lit;
    if (this.stale) roll.ghosts = live.on ? [] : this.cards.ghosts(this.session);
    roll.point = live.on || this.making || !this.music.count ? null : (this.point ?? this.music.duration);
    stage.draw(at);
    setText(byId("time"), live.on ? clock(at) : `${clock(at)} / ${clock(roll.music.duration)}`);
    this.keyboard.light(roll.sounding);
  }

  drawRest() {
    const { session } = this;
    setAttribute(byId("roll"), "aria-label", this.stage.label(this.music));
    render(this);
    this.cards.render(session, this.stage.roll.colours);
    this.tree.render(session);
    this.settings.render(session);
  }

  listen() {
    const { transport } = this;
    listenToKeys(this, (name) => this.actions[name]());
    byId("session").addEventListener("click", () => this.actions.sessions());
    byId("problem").lastChild.addEventListener("click", () => this.complain(""));
    byId("volume").addEventListener("input", (event) => transport.setVolume(event.target.valueAsNumber));
    document.addEventListener("visibilitychange", () => {
      if (transport.playing) transport.schedule();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.stage.roll.colours = readColours();
      this.refresh();
    });
    reducedMotion.addEventListener("change", () => this.refresh());
  }
}

window.studio = new Studio();
