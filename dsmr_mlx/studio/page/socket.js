// The connection to the studio: JSON messages, requests with answers, and reconnecting.
const FIRST_PAUSE = 300,
  LONGEST_PAUSE = 4000; // milliseconds between two attempts
const PING = 20000; // milliseconds

export class Socket {
  // onMessage(message), onOpen(), onClose(): once for each loss; onRefused(): the program runs with another token.
  constructor({ onMessage, onOpen, onClose, onRefused }) {
    Object.assign(this, {
      onMessage,
      onOpen,
      onClose,
      onRefused,
      socket: null,
      pause: FIRST_PAUSE,
      waiting: new Map(),
      last: 0,
    });
    this.connect();
    setInterval(() => this.open && this.send({ type: "ping" }), PING);
  }

  get open() {
    return this.socket !== null && this.socket.readyState === WebSocket.OPEN;
  }

  connect() {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const socket = (this.socket = new WebSocket(`${scheme}://${location.host}/socket${location.search}`));
    let opened = false;
    socket.onmessage = (event) => {
      if (!opened) {
        opened = true; // with its first message: a client too many is refused after it has opened
        this.pause = FIRST_PAUSE;
        this.onOpen();
      }
      this.receive(JSON.parse(event.data));
    };
    socket.onclose = () => {
      for (const answer of this.waiting.values()) answer(null);
      this.waiting.clear();
      if (opened) this.onClose();
      else this.findOutWhy();
      setTimeout(() => this.connect(), this.pause);
      this.pause = Math.min(this.pause * 1.6, LONGEST_PAUSE);
    };
  }

  // A WebSocket does not report why it was refused.
  async findOutWhy() {
    const answer = await fetch("/shared/music.js", { method: "HEAD" }).catch(() => null);
    if (answer?.status === 403) this.onRefused();
  }

  receive(message) {
    const answer = this.waiting.get(message.request);
    if (answer && (message.type === "done" || message.type === "error")) {
      this.waiting.delete(message.request);
      answer(message);
    }
    this.onMessage(message);
  }

  // Returns whether it was sent.
  send(message) {
    if (this.open) this.socket.send(JSON.stringify(message));
    return this.open;
  }

  // Resolves to `done` or `error`, or to null if the connection is lost.
  ask(message) {
    const request = ++this.last;
    if (!this.send({ ...message, request })) return Promise.resolve(null);
    return new Promise((resolve) => this.waiting.set(request, resolve));
  }
}
