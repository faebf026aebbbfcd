// The messages on the page: redrawn when the branch changes, scrolled as one grows, and announced to screen readers.
import { byId, h } from "./dom.js";
import { MessageView } from "./message.js";
import { branches, pathTo } from "./tree.js";

const NEAR_PX = 90;

export class Transcript {
  constructor(actions) {
    this.actions = actions;
    this.element = byId("messages");
    this.scroller = byId("scroll");
    this.toEnd = byId("to-end");
    this.views = new Map();
    this.isFollowing = true;
    this.frame = null;
    this.growing = null; // the message to update in the next frame
    this.numSpoken = 0;
    this.scroller.addEventListener("scroll", () => this.noteScroll());
    this.toEnd.addEventListener("click", () => this.goToEnd());
  }

  /** Show a conversation from its first message to its leaf. */
  show(conversation) {
    const path = pathTo(conversation);
    this.views = new Map(
      path.map((node, i) => [
        node.id,
        new MessageView(node, branches(conversation, node), this.actions, i === path.length - 1),
      ]),
    );
    this.element.replaceChildren(...Array.from(this.views.values(), (view) => view.element));
    byId("welcome").hidden = path.length > 0;
    this.goToEnd();
  }

  /** Update a message in the next frame. */
  grow(node) {
    this.growing = node;
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    const [node, began] = [this.growing, performance.now()];
    this.growing = null;
    if (node) this.refresh(node, true);
    // A very long answer may take longer than a frame; it is then updated less often instead of lagging more and more.
    const took = performance.now() - began;
    setTimeout(
      () => {
        this.frame = null;
        if (this.growing) this.grow(this.growing); // text received meanwhile
      },
      took > 16 ? 4 * took : 0,
    );
  }

  /** Announce that a message begins to grow. */
  begin(node) {
    byId("spoken").replaceChildren();
    this.numSpoken = 0;
    this.refresh(node, true);
    this.goToEnd();
  }

  /** Show the final state of a message. */
  end(node) {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    this.growing = null;
    this.refresh(node, false);
  }

  refresh(node, isRunning) {
    const view = this.views.get(node.id);
    if (!view) return; // another conversation is displayed
    view.refresh(isRunning);
    this.speak(view, isRunning);
    if (this.isFollowing) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.noteScroll();
  }

  /** Let screen readers read each paragraph once, when complete; changing text would be read in pieces. */
  speak(view, isRunning) {
    const blocks = [...view.body.children];
    const whole = isRunning ? blocks.slice(0, -1) : blocks;
    for (const block of whole.slice(this.numSpoken)) byId("spoken").append(h("p", {}, block.textContent));
    this.numSpoken = Math.max(this.numSpoken, whole.length);
    if (!isRunning) byId("spoken").append(h("p", {}, view.node.error ?? "End of the answer"));
  }

  goToEnd() {
    this.isFollowing = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.noteScroll();
  }

  noteScroll() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.isFollowing = scrollHeight - scrollTop - clientHeight < NEAR_PX;
    this.toEnd.hidden = this.isFollowing;
  }
}
