// What ComfyUI's page does for this pack's nodes: sentences as toasts, texts on nodes, where a node comes from.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const REGISTRY = { cnr_id: "lcm-lookahead", ver: "0.2.0" }; // name and version of pyproject.toml
const FOLDER = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2)); // this pack's in custom_nodes
const COLOURS = {
  LOOKAHEAD_ENCODER: "#e0a458",
  LOOKAHEAD_REFERENCE: "#5aa9e6",
  LOOKAHEAD_FACE_ANALYSIS: "#7fc8a9",
  LOOKAHEAD_LOSS: "#d1495b",
  LOOKAHEAD_SHORTCUT: "#b58be8",
  LOOKAHEAD_WEIGHTS: "#8d99e8",
  LOOKAHEAD_CONCEPT_ENCODER: "#d98c5f",
  LOOKAHEAD_CONCEPT: "#e88bc4",
  LOOKAHEAD_SCORES: "#6fc3d0",
  LOOKAHEAD_NOISE_GUIDE: "#9bc53d",
  LOOKAHEAD_GUIDANCE_REPORT: "#c9c26d",
};
const NODE_COLOUR = { color: "#223", bgcolor: "#335" }; // as in the workflows
const LONG = 20000; // milliseconds that a sentence stays

const isOurs = (type) => typeof type === "string" && type.startsWith("Lookahead");

// A host's node fails in our code too: a sampler in the guidance, a guider in the KV injection.
const isOurFault = (error) =>
  isOurs(error.node_type) ||
  [error.traceback].flat().some((line) => String(line).replaceAll("\\", "/").includes(`/${FOLDER}/nodes/`));

const nameOf = (type) => globalThis.LiteGraph?.registered_node_types?.[type]?.title ?? type;

function toast(severity, summary, detail) {
  app.extensionManager?.toast?.add({ severity, summary, detail, life: LONG });
}

// "8:3" is node 3 of the subgraph that node 8 of the graph is.
function findNode(id) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

function showError({ detail }) {
  if (isOurFault(detail)) toast("error", nameOf(detail.node_type), detail.exception_message?.trim());
}

// Of an input without a link or value the host's details are its name alone.
const sentenceOf = (error) =>
  error.type === "required_input_missing" ? `${error.message}: ${error.details}` : error.details || error.message;

// A prompt that the host refuses never starts, so no event tells of it.
function showRefusals() {
  const queue = api.queuePrompt;
  api.queuePrompt = async function (...input) {
    try {
      return await queue.apply(this, input);
    } catch (error) {
      for (const node of Object.values(error?.response?.node_errors ?? {}))
        if (isOurs(node.class_type))
          for (const one of node.errors ?? []) toast("error", nameOf(node.class_type), sentenceOf(one));
      throw error;
    }
  };
}

// The page itself shows the text of one node of its own only, and newer ones take away all texts when a run ends, also
// of nodes that did not run again.
const texts = new WeakMap(); // by workflow, then by node
let ranIn; // the workflow that the run belongs to

const activeWorkflow = () => app.extensionManager?.workflow?.activeWorkflow;

function beginRun() {
  ranIn = activeWorkflow();
}

function showText({ detail }) {
  const nodeId = String(detail.display_node ?? detail.node);
  const text = [detail.output?.text ?? []].flat().join("\n");
  const workflow = ranIn ?? activeWorkflow(); // a page that was loaded during the run has not seen it begin
  if (!text || workflow !== activeWorkflow() || !isOurs(findNode(nodeId)?.type)) return;
  if (workflow) texts.set(workflow, (texts.get(workflow) ?? new Map()).set(nodeId, text));
  api.dispatchCustomEvent("progress_text", { nodeId, text });
}

function showTextsAgain() {
  setTimeout(() => {
    for (const [nodeId, text] of texts.get(activeWorkflow()) ?? [])
      if (isOurs(findNode(nodeId)?.type)) api.dispatchCustomEvent("progress_text", { nodeId, text });
  });
}

// The page leaves the value of an empty list out, of which the host says "Required input is missing"; an empty name
// reaches the node, which says where its files belong.
function sendEmptyChoices(node) {
  if (isOurs(node.comfyClass))
    for (const widget of node.widgets ?? []) if (widget.type === "combo") widget.value ??= "";
}

// The host lists a pack's workflows in the order of the file system.
function sortTemplates() {
  const list = api.getWorkflowTemplates;
  api.getWorkflowTemplates = async function (...input) {
    const templates = await list.apply(this, input);
    templates?.[FOLDER]?.sort();
    return templates;
  };
}

// Nodes of a file keep the colour, or none, that was saved with them.
function colourNew(node) {
  if (!app.configuringGraph && !node.color && !node.bgcolor) Object.assign(node, NODE_COLOUR);
}

// The preset of a node (nodes/presets.py) takes the place of some of its numbers. So that what stands there is what
// acts, choosing one writes them, and who changes one by hand leaves the preset. What a file holds stays as it is.
function followPreset(node) {
  const { required, optional } = node.constructor.nodeData?.input ?? {};
  const about = { ...required, ...optional }.preset?.[1];
  const presets = about?.lookahead_presets;
  const widget = (name) => node.widgets?.find((one) => one.name === name);
  const preset = widget("preset");
  if (!presets || !preset) return;
  const linked = (name) => node.inputs?.some((input) => input.widget?.name === name && input.link != null);
  const write = (values, except) => {
    for (const [name, value] of Object.entries(values)) if (name !== except && widget(name)) widget(name).value = value;
    node.setDirtyCanvas?.(true, true);
  };
  afterChange(preset, () => write(presets[preset.value] ?? {}));
  for (const name of new Set(Object.values(presets).flatMap(Object.keys)))
    if (widget(name))
      afterChange(widget(name), () => {
        const values = presets[preset.value];
        // A primitive node sets what it is linked to whenever a prompt is queued.
        if (!values || widget(name).value === values[name] || linked(name)) return;
        write(values, name);
        const lost = about.lookahead_beyond?.[preset.value];
        const sentence = `the preset ${preset.value} was left, and with it ${lost}, which no number says.`;
        if (lost) toast("info", nameOf(node.comfyClass), `${name} was changed: ${sentence}`);
        preset.value = about.default;
      });
}

function afterChange(widget, then) {
  const callback = widget.callback;
  widget.callback = function (...input) {
    const result = callback?.apply(this, input);
    then();
    return result;
  };
}

app.registerExtension({
  name: "lcmlookahead.page",
  init() {
    sortTemplates();
  },
  setup() {
    api.addEventListener("execution_error", showError);
    api.addEventListener("execution_start", beginRun);
    api.addEventListener("executed", showText);
    for (const end of ["execution_success", "execution_error", "execution_interrupted"])
      api.addEventListener(end, showTextsAgain);
    api.addEventListener("lookahead_notice", ({ detail }) => toast("warn", "LCM-Lookahead", detail.text));
    showRefusals();
  },
  // After every palette: the page gives a type that it does not know an empty colour; a palette's own stays.
  afterConfigureGraph() {
    for (const colours of [app.canvas?.default_connection_color_byType, globalThis.LGraphCanvas?.link_type_colors])
      if (colours) for (const [type, colour] of Object.entries(COLOURS)) colours[type] ||= colour;
  },
  // So that a page without the pack can name it, with or without a Manager.
  nodeCreated(node) {
    if (isOurs(node.comfyClass)) {
      node.properties = { ...REGISTRY, ...node.properties };
      colourNew(node);
      followPreset(node);
    }
    sendEmptyChoices(node);
  },
  loadedGraphNode: sendEmptyChoices,
});
