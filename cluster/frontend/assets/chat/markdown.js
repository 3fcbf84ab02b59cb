// Text of a model to HTML that cannot do anything. Whatever it wrote is hostile until DOMPurify has
// seen it; the content security policy, with trusted types, is the second wall.

import DOMPurify from "../vendor/purify.es.mjs";
import { Marked } from "../vendor/marked.esm.js";

const RULES = {
  ALLOWED_TAGS: [
    ..."p br hr strong em del code pre blockquote ul ol li h1 h2 h3 h4 h5 h6 a".split(" "),
    ..."table thead tbody tr th td".split(" "),
  ],
  ALLOWED_ATTR: ["href", "title", "start", "align"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_TRUSTED_TYPE: true,
};

const escaped = (text) =>
  text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escaped(text), // shown as it was written
    image: ({ text }) => escaped(text), // nothing is loaded from where a model says
    br: ({ raw }) => `<br>${raw.slice(raw.indexOf("\n") + 1)}`, // code often comes without a fence
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

/** What `innerHTML` may be set to. */
export const purified = (html) => DOMPurify.sanitize(html, RULES);

/** Put `text` into the element, as Markdown or as it is. */
export function showText(element, text, asMarkdown) {
  element.classList.toggle("plain", !asMarkdown);
  if (asMarkdown) element.innerHTML = purified(marked.parse(text));
  else element.textContent = text;
}
