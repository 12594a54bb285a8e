/** Names of files in folders, in workflows from another system: Windows writes "folder\file", others "folder/file". */

const plain = (name) => name.replaceAll("\\", "/");

/**
 * Give each choice that this server knows by the other spelling the server's own; it would refuse the file's. What it does not know at
 * all stays, so that it is seen to be missing.
 */
export function useOwnFileNames(node) {
  for (const widget of node.widgets ?? []) {
    const choices = widget.options?.values;
    if (!Array.isArray(choices) || typeof widget.value !== "string" || choices.includes(widget.value)) continue;
    const own = choices.find((choice) => typeof choice === "string" && plain(choice) === plain(widget.value));
    if (own !== undefined) widget.value = own;
  }
}
