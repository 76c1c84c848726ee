// Plays all tracks of a separation at once, exactly in sync.
//
// The sources sum to the original, so that a shift of one sample between two
// of them can be heard: audio elements are not exact enough. Pieces of the wav
// files are fetched shortly before they sound, and scheduled on one clock.
(() => {
  const FIRST = 0.5; // seconds fetched before anything sounds
  const PIECE = 2; // seconds fetched at once later on
  const AHEAD = 6; // seconds scheduled before they sound
  const LEAD = 0.1; // seconds between scheduling and the first sound
  const FADE = 0.01; // seconds of a change of volume, so that none clicks

  const sleep = (seconds) =>
    new Promise((done) => setTimeout(done, seconds * 1000));

  const clock = (seconds) => {
    const whole = Math.floor(seconds);
    return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
  };

  async function fetchBytes(url, first, last) {
    const headers = { Range: `bytes=${first}-${last}` };
    const response = await fetch(url, { headers });
    if (response.status !== 206) {
      throw new Error("The audio is no longer on the server.");
    }
    return response.arrayBuffer();
  }

  // Position of the samples in a wav or RF64 file.
  async function dataOffset(url) {
    const view = new DataView(await fetchBytes(url, 0, 4095));
    const name = (at) =>
      String.fromCharCode(...new Uint8Array(view.buffer, at, 4));
    for (let at = 12; at + 8 <= view.byteLength; ) {
      if (name(at) === "data") return at + 8;
      const size = view.getUint32(at + 4, true);
      at += 8 + size + (size % 2);
    }
    throw new Error("The audio is no wav file.");
  }

  class Track {
    constructor(row, player) {
      this.row = row;
      this.player = player;
      this.url = row.dataset.url;
      this.playhead = row.querySelector(".playhead");
      this.mute = row.querySelector(".mute");
      this.solo = row.querySelector(".solo");
      for (const button of [this.mute, this.solo]) {
        button.addEventListener("click", () => {
          const pressed = button.getAttribute("aria-pressed") === "true";
          button.setAttribute("aria-pressed", String(!pressed));
          player.mix();
        });
      }
      const view = row.querySelector(".view");
      view.addEventListener("click", (event) => {
        const box = view.getBoundingClientRect();
        player.seek(((event.clientX - box.left) / box.width) * player.seconds);
      });
    }

    muted() {
      return this.mute.getAttribute("aria-pressed") === "true";
    }

    soloed() {
      return this.solo.getAttribute("aria-pressed") === "true";
    }

    connect(context, output) {
      this.gain = context.createGain();
      this.gain.gain.value = this.heard ? 1 : 0;
      this.gain.connect(output);
    }

    setHeard(heard) {
      this.heard = heard;
      this.row.dataset.heard = String(heard);
      if (!this.gain) return;
      const { currentTime } = this.gain.context;
      const { gain } = this.gain;
      gain.cancelScheduledValues(currentTime);
      gain.setValueAtTime(gain.value, currentTime);
      gain.linearRampToValueAtTime(heard ? 1 : 0, currentTime + FADE);
    }

    async read(first, count) {
      const { channels, rate, context } = this.player;
      this.offset ??= await dataOffset(this.url);
      const start = this.offset + first * channels * 4;
      const end = start + count * channels * 4 - 1;
      // float32, little endian as wav and as all that browsers run on
      const sig = new Float32Array(await fetchBytes(this.url, start, end));
      const buffer = context.createBuffer(channels, count, rate);
      for (let channel = 0; channel < channels; channel++) {
        const samples = buffer.getChannelData(channel);
        for (let i = 0; i < count; i++) {
          samples[i] = sig[i * channels + channel];
        }
      }
      return buffer;
    }
  }

  class Player {
    constructor(root) {
      this.root = root;
      this.rate = Number(root.dataset.rate);
      this.channels = Number(root.dataset.channels);
      this.frames = Number(root.dataset.frames);
      this.seconds = this.frames / this.rate;
      this.position = 0; // seconds, where it does not play
      this.run = null; // what plays now
      this.play = root.querySelector(".play");
      this.seeker = root.querySelector(".seek");
      this.time = root.querySelector(".time");
      this.message = root.querySelector(".message");
      this.tracks = [...root.querySelectorAll(".track")].map(
        (row) => new Track(row, this),
      );
      this.play.addEventListener("click", () =>
        this.run ? this.pause() : this.start(),
      );
      this.seeker.addEventListener("input", () =>
        this.seek((this.seeker.value / this.seeker.max) * this.seconds),
      );
      this.mix();
      this.show();
    }

    // Solo goes before mute: one solo, and only soloed tracks are heard.
    mix() {
      const anySolo = this.tracks.some((track) => track.soloed());
      for (const track of this.tracks) {
        track.setHeard(anySolo ? track.soloed() : !track.muted());
      }
    }

    open() {
      if (this.context) return;
      // at the rate of the music pieces join without resampling
      try {
        this.context = new AudioContext({ sampleRate: this.rate });
      } catch {
        this.context = new AudioContext();
      }
      this.output = this.context.createGain();
      this.output.connect(this.context.destination);
      for (const track of this.tracks) track.connect(this.context, this.output);
    }

    now() {
      if (!this.run || this.run.zero === undefined) return this.position;
      const time = this.context.currentTime - this.run.zero;
      return Math.min(Math.max(time, this.run.from), this.seconds);
    }

    // A time on the grid of samples, or sources would be interpolated.
    soon() {
      const { currentTime, sampleRate } = this.context;
      return Math.ceil((currentTime + LEAD) * sampleRate) / sampleRate;
    }

    async start() {
      const run = { from: this.position, sources: new Set() };
      this.run = run; // ends the loop of an older one
      this.message.textContent = "";
      this.show();
      try {
        this.open();
        await this.context.resume();
        await this.feed(run);
      } catch (error) {
        if (this.run !== run) return;
        this.pause();
        this.message.textContent = error.message;
      }
    }

    async feed(run) {
      let piece = Math.round(FIRST * this.rate);
      run.frame = Math.floor(run.from * this.rate); // scheduled up to here
      while (run.frame < this.frames) {
        const first = run.frame;
        const count = Math.min(piece, this.frames - first);
        const buffers = await Promise.all(
          this.tracks.map((track) => track.read(first, count)),
        );
        if (this.run !== run) return;
        const soon = this.soon();
        // late: all tracks wait together
        if (run.zero === undefined || run.zero + first / this.rate < soon - LEAD)
          run.zero = soon - first / this.rate;
        const when = run.zero + first / this.rate;
        buffers.forEach((buffer, i) => {
          const source = this.context.createBufferSource();
          source.buffer = buffer;
          source.connect(this.tracks[i].gain);
          source.onended = () => run.sources.delete(source);
          source.start(when);
          run.sources.add(source);
        });
        run.frame += count;
        piece = Math.min(piece * 2, Math.round(PIECE * this.rate));
        const ahead = () =>
          run.zero + run.frame / this.rate - this.context.currentTime;
        while (this.run === run && ahead() > AHEAD) await sleep(0.1);
        if (this.run !== run) return;
      }
      while (this.run === run && this.now() < this.seconds) await sleep(0.05);
      if (this.run !== run) return;
      this.stop();
      this.position = 0;
      this.show();
    }

    stop() {
      const { run } = this;
      this.run = null;
      for (const source of run?.sources ?? []) source.stop();
    }

    pause() {
      this.position = this.now();
      this.stop();
      this.show();
    }

    seek(seconds) {
      const playing = this.run !== null;
      if (playing) this.stop();
      this.position = Math.min(Math.max(seconds, 0), this.seconds);
      if (playing) this.start();
      else this.show();
    }

    show() {
      const now = this.now();
      const share = this.seconds ? now / this.seconds : 0;
      this.play.textContent = this.run ? "Pause" : "Play";
      this.seeker.value = share * this.seeker.max;
      const text = `${clock(now)} / ${clock(this.seconds)}`;
      this.time.textContent = text;
      this.seeker.setAttribute("aria-valuetext", text);
      for (const { playhead } of this.tracks) {
        playhead.style.left = `${share * 100}%`;
      }
      if (this.run && !this.drawing) {
        this.drawing = true;
        requestAnimationFrame(() => {
          this.drawing = false;
          if (this.run) this.show();
        });
      }
    }

    close() {
      this.stop();
      this.context?.close();
    }
  }

  // Results come and go without a reload of the page.
  const players = new Set();
  const update = () => {
    for (const player of players) {
      if (player.root.isConnected) continue;
      player.close();
      players.delete(player);
    }
    for (const root of document.querySelectorAll(".separation")) {
      if (root.player) continue;
      root.player = new Player(root);
      players.add(root.player);
    }
  };
  new MutationObserver(update).observe(document, {
    childList: true,
    subtree: true,
  });
})();
