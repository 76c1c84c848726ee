// Plays the stems of a separation at once, exactly in sync.
//
// They sum to the song, so that a shift of one sample between two of them can
// be heard: audio elements are not exact enough. Buffers that start at one time
// of one clock are.
//
// Runs with gradio's `element`, `props` and `watch`.

const LEAD = 0.05; // seconds from a press of Play to the first sound
const FADE = 0.01; // seconds of a change of volume, so that none clicks
const SILENT = -40; // dB, the lowest gain, which is silence

const make = (tag, attributes, ...children) => {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
};

const clock = (seconds) => {
  const whole = Math.floor(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
};

class Stem {
  constructor({ name, file, url, picture }, player) {
    this.url = url;
    this.gain = player.context.createGain();
    this.panner = player.context.createStereoPanner();
    this.gain.connect(this.panner).connect(player.context.destination);
    const toggle = (text) => {
      const button = make("button", { type: "button", className: text }, text);
      button.ariaLabel = `${text} ${name}`;
      button.ariaPressed = "false";
      button.onclick = () => {
        button.ariaPressed = String(button.ariaPressed === "false");
        player.mix();
      };
      return button;
    };
    const slider = (text, range) => {
      const input = make("input", { type: "range", ...range, value: 0 });
      input.ariaLabel = `${text} of ${name}`;
      input.oninput = () => player.mix();
      return input;
    };
    this.mute = toggle("Mute");
    this.solo = toggle("Solo");
    this.volume = slider("Gain", { min: SILENT, max: 12, step: 0.5 });
    this.pan = slider("Pan", { min: -1, max: 1, step: 0.05 });
    this.values = make("small", {});
    this.playhead = make("div", { className: "playhead" });
    const image = make("img", { src: picture, alt: `Spectrogram of ${name}` });
    const view = make("div", { className: "view" }, image, this.playhead);
    view.onclick = ({ clientX }) => {
      const { left, width } = view.getBoundingClientRect();
      player.seek(((clientX - left) / width) * player.seconds);
    };
    this.row = make(
      "div",
      { className: "stem" },
      make("b", {}, name),
      make("span", {}, this.mute, this.solo),
      make("div", {}, this.volume, this.values, this.pan),
      view,
      make("a", { href: url, download: file }, "Download"),
    );
  }

  async load(context) {
    const response = await fetch(this.url);
    if (!response.ok) throw new Error("The stems are no longer here.");
    this.buffer = await context.decodeAudioData(await response.arrayBuffer());
  }

  setHeard(heard) {
    const decibels = Number(this.volume.value);
    const muted = !heard || decibels === SILENT;
    const pan = Number(this.pan.value);
    const text = decibels === SILENT ? "-∞" : decibels.toFixed(1);
    this.values.textContent = `${text} dB, pan ${pan}`;
    this.row.style.setProperty("--heard", muted ? 0.35 : 1);
    // a panner lowers mono by 3 dB in the middle
    const level = this.buffer?.numberOfChannels === 1 ? Math.SQRT2 : 1;
    const volume = muted ? 0 : level * 10 ** (decibels / 20);
    const now = this.gain.context.currentTime;
    this.gain.gain.setTargetAtTime(volume, now, FADE);
    this.panner.pan.setTargetAtTime(pan, now, FADE);
  }
}

class Player {
  constructor({ stems, archive }) {
    this.context = new AudioContext();
    this.position = 0; // seconds, where it does not play
    this.sources = []; // what plays now
    this.seconds = 0;
    this.stems = stems.map((stem) => new Stem(stem, this));
    this.button = make("button", { type: "button", disabled: true }, "Loading");
    this.button.onclick = () =>
      this.sources.length ? this.stop() : this.play();
    this.time = make("span", {});
    this.seeker = make("input", { type: "range", max: 1, step: "any" });
    this.seeker.ariaLabel = "Position";
    this.seeker.oninput = () => this.seek(this.seeker.value * this.seconds);
    const all = make("a", { href: archive, download: "" }, "Download all");
    const controls = [this.button, this.time, this.seeker, all];
    this.nodes = [
      make("div", { className: "stem" }, ...controls),
      ...this.stems.map(({ row }) => row),
      make("p", {}, "Together, at 0 dB, the stems are the song."),
    ];
    this.mix();
    this.load();
  }

  async load() {
    try {
      await Promise.all(this.stems.map((stem) => stem.load(this.context)));
      this.seconds = this.stems[0].buffer.duration;
      this.button.disabled = false;
      this.mix();
      this.show();
    } catch (error) {
      this.button.textContent = "Failed";
      this.time.textContent = error.message;
    }
  }

  // Solo goes before mute: one solo, and only soloed stems are heard.
  mix() {
    const pressed = (button) => button.ariaPressed === "true";
    const anySolo = this.stems.some(({ solo }) => pressed(solo));
    for (const stem of this.stems) {
      stem.setHeard(anySolo ? pressed(stem.solo) : !pressed(stem.mute));
    }
  }

  async play() {
    await this.context.resume();
    if (this.sources.length) return; // pressed twice
    this.start = this.context.currentTime + LEAD;
    this.sources = this.stems.map(({ buffer, gain }) => {
      const source = this.context.createBufferSource();
      source.buffer = buffer;
      source.connect(gain);
      source.start(this.start, this.position);
      return source;
    });
    this.show();
  }

  now() {
    if (!this.sources.length) return this.position;
    const played = Math.max(this.context.currentTime - this.start, 0);
    return Math.min(this.position + played, this.seconds);
  }

  stop(position = this.now()) {
    for (const source of this.sources) source.stop();
    this.sources = [];
    this.position = position;
    this.show();
  }

  seek(seconds) {
    const playing = this.sources.length > 0;
    this.stop(Math.min(Math.max(seconds, 0), this.seconds));
    if (playing) this.play();
  }

  show() {
    if (this.now() >= this.seconds && this.sources.length) return this.stop(0);
    const share = this.seconds ? this.now() / this.seconds : 0;
    this.button.textContent = this.sources.length ? "Pause" : "Play";
    this.time.textContent = `${clock(this.now())} / ${clock(this.seconds)}`;
    this.seeker.value = share;
    for (const stem of this.stems) stem.playhead.style.left = `${share * 100}%`;
    cancelAnimationFrame(this.frame);
    if (!this.sources.length) return;
    this.frame = requestAnimationFrame(() => this.show());
  }
}

watch("value", () => {
  element.player?.context.close();
  element.player = props.value ? new Player(props.value) : null;
  element.replaceChildren(...(element.player?.nodes ?? []));
});
