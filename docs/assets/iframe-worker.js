// A browser starts no worker for a page that was opened as a file. Search then runs its worker's script in a hidden frame.
"use strict";

class WorkerInAFrame extends EventTarget {
  constructor(url) {
    super();
    this.onmessage = null;
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    document.body.append(this.frame);
    const inside = this.frame.contentWindow;

    const load = (address) =>
      new Promise((loaded, failed) => {
        const script = inside.document.createElement("script");
        script.onload = loaded;
        script.onerror = () => failed(new Error(`${address} cannot be loaded`));
        script.src = address;
        inside.document.body.append(script);
      });

    // what the script of a worker finds around it
    inside.importScripts = async (...addresses) => {
      for (const address of addresses) await load(address);
    };
    inside.postMessage = (data) => {
      const event = new MessageEvent("message", { data });
      this.dispatchEvent(event);
      if (this.onmessage) this.onmessage(event);
    };
    this.started = load(url);
  }

  postMessage(data) {
    this.started.then(() => {
      const inside = this.frame.contentWindow;
      inside.dispatchEvent(new inside.MessageEvent("message", { data: structuredClone(data) }));
    });
  }

  terminate() {
    this.frame.remove();
  }
}

if (location.protocol === "file:") window.Worker = WorkerInAFrame;
