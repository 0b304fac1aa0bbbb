// Shows the options of this pack's nodes in the page's language. ComfyUI translates names and tooltips from
// locales/<code>/nodeDefs.json by itself, but shows options as they are. Only what is shown changes: workflows keep
// the English values, and an option without a translation stays English.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

let texts = {};

const labelOf = (node, input, value) => {
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  return texts[language]?.nodeDefs?.[node]?.inputs?.[input]?.options?.[value] ?? value ?? "";
};

app.registerExtension({
  name: "lcmlookahead.optionLabels",

  async init() {
    try {
      texts = await (await api.fetchApi("/i18n")).json();
    } catch (error) {
      console.warn("LCM-Lookahead: options stay English, since the host gave no translations.", error);
    }
  },

  nodeCreated(node) {
    const type = node.comfyClass;
    if (!type?.startsWith("Lookahead")) return;
    for (const widget of node.widgets ?? []) {
      if (widget.type === "combo" && widget.options) {
        widget.options.getOptionLabel ??= (value) => labelOf(type, widget.name, value);
      }
    }
  },
});
