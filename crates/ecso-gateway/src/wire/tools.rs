//! The tools of Responses. A chat only has functions, so the client's other tools become functions,
//! and calls of these become calls of the tools again.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::{Call, Fields, invalid, unsupported};
use crate::error::ApiError;

/// Tools that a server would run. They would bring in content that the guard never sees.
const SERVER_TOOLS: [&str; 10] = [
    "web_search",
    "web_search_2025_08_26",
    "web_search_preview",
    "web_search_preview_2025_03_11",
    "file_search",
    "code_interpreter",
    "image_generation",
    "mcp",
    "tool_search",
    "programmatic_tool_calling",
];

/// The function name of the shell tool.
const SHELL: &str = "local_shell";

/// The tools of a request.
#[derive(Default)]
pub(super) struct Tools {
    /// The client's tool behind each function of the chat.
    known: BTreeMap<String, Tool>,
    /// The functions, in the format of chat completions.
    functions: Vec<Value>,
    /// Kinds of tools that are left out.
    omitted: BTreeSet<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Tool {
    kind: Kind,
    namespace: Option<String>,
    name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Function,
    /// Takes any text.
    Custom,
    Shell,
}

/// The function name of a tool.
fn function_name(namespace: Option<&str>, name: &str) -> String {
    namespace.map_or_else(|| name.to_owned(), |namespace| format!("{namespace}__{name}"))
}

/// Whether a server would run this tool.
pub(super) fn is_server_tool(tool: &Value) -> bool {
    tool["type"].as_str().is_some_and(|kind| SERVER_TOOLS.contains(&kind))
}

impl Tools {
    /// Reads the tools of a request. Server tools are left out if there are others; a request with
    /// nothing but server tools is refused.
    pub(super) fn parse(tools: Vec<Value>) -> Result<Self, ApiError> {
        let mut parsed = Self::default();
        let first = tools.first().and_then(|tool| tool["type"].as_str()).map(str::to_owned);
        for (index, tool) in tools.into_iter().enumerate() {
            parsed.add(Fields::new(tool, format!("tools.{index}"))?, None)?;
        }
        match first.filter(|_| parsed.functions.is_empty()) {
            Some(kind) => Err(unsupported("tools.0", &kind)),
            None => Ok(parsed),
        }
    }

    fn add(&mut self, mut tool: Fields, namespace: Option<&str>) -> Result<(), ApiError> {
        let kind = tool.required_text("type")?;
        let mut function = Map::new();
        let (kind, name) = match kind.as_str() {
            "function" => {
                for name in ["description", "parameters", "strict"] {
                    tool.move_to(name, &mut function, name);
                }
                (Kind::Function, tool.required_text("name")?)
            }
            "custom" => {
                let described = tool.text("description")?.unwrap_or_default();
                let format = tool.take("format").filter(|format| format["type"] != "text");
                let format = format.map_or_else(String::new, |format| {
                    format!("\n\nThe form of its input: {format}")
                });
                function.insert("description".to_owned(), format!("{described}{format}").into());
                let input = json!({"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]});
                function.insert("parameters".to_owned(), input);
                (Kind::Custom, tool.required_text("name")?)
            }
            "local_shell" if namespace.is_none() => {
                function.insert(
                    "description".to_owned(),
                    "Runs a command on the user's machine.".into(),
                );
                let properties = json!({"command": {"type": "array", "items": {"type": "string"}},
                    "working_directory": {"type": "string"}, "timeout_ms": {"type": "integer"}});
                let input =
                    json!({"type": "object", "properties": properties, "required": ["command"]});
                function.insert("parameters".to_owned(), input);
                (Kind::Shell, SHELL.to_owned())
            }
            "namespace" if namespace.is_none() => return self.namespace(tool),
            server_tool if SERVER_TOOLS.contains(&server_tool) => {
                self.omitted.insert(server_tool.to_owned());
                return Ok(());
            }
            other => return Err(unsupported(&tool.path, other)),
        };
        tool.ignore(&["defer_loading"]);
        let flat = function_name(namespace, &name);
        let path = tool.path_of("name");
        tool.finish()?;
        function.insert("name".to_owned(), flat.clone().into());
        let known = Tool { kind, namespace: namespace.map(str::to_owned), name };
        if self.known.insert(flat, known.clone()).is_some_and(|other| other != known) {
            return Err(invalid(&path, "is also the name of another tool"));
        }
        self.functions.push(json!({"type": "function", "function": function}));
        Ok(())
    }

    /// Reads the tools of a namespace. Its description is prepended to that of the first tool.
    fn namespace(&mut self, mut tool: Fields) -> Result<(), ApiError> {
        let (name, described) = (tool.required_text("name")?, tool.text("description")?);
        let (tools, path, first) =
            (tool.list("tools")?, tool.path_of("tools"), self.functions.len());
        tool.finish()?;
        for (index, tool) in tools.into_iter().enumerate() {
            self.add(Fields::new(tool, format!("{path}.{index}"))?, Some(&name))?;
        }
        if let (Some(described), Some(tool)) = (described, self.functions.get_mut(first)) {
            let own = tool["function"]["description"].as_str().unwrap_or_default();
            tool["function"]["description"] = format!("{described}\n\n{own}").into();
        }
        Ok(())
    }

    /// Adds the functions to a chat, as far as the client's `choice` allows them.
    pub(super) fn add_to_chat(
        &self,
        choice: Option<Value>,
        chat: &mut Map<String, Value>,
    ) -> Result<(), ApiError> {
        let mut functions = self.functions.clone();
        match choice {
            None => {}
            Some(Value::Object(remaining)) => {
                let mut choice = Fields { path: "tool_choice".into(), remaining };
                let chosen =
                    if choice.remaining.get("type").is_some_and(|kind| kind == "allowed_tools") {
                        let (mode, allowed) = self.allowed(choice)?;
                        functions.retain(|tool| {
                            tool["function"]["name"]
                                .as_str()
                                .is_some_and(|name| allowed.contains(name))
                        });
                        mode.into()
                    } else {
                        let path = choice.path.clone();
                        let name = self.function_of_choice(&mut choice)?.ok_or_else(|| {
                            invalid(&path, "names a tool that a server would run")
                        })?;
                        choice.finish()?;
                        json!({"type": "function", "function": {"name": name}})
                    };
                chat.insert("tool_choice".to_owned(), chosen);
            }
            Some(word) => {
                chat.insert("tool_choice".to_owned(), word);
            }
        }
        if !functions.is_empty() {
            chat.insert("tools".to_owned(), functions.into());
        }
        Ok(())
    }

    /// The tools that may be called, and whether one must be.
    fn allowed(&self, mut choice: Fields) -> Result<(String, BTreeSet<String>), ApiError> {
        let (mode, path) = (choice.required_text("mode")?, choice.path_of("tools"));
        if !matches!(mode.as_str(), "auto" | "required") {
            return Err(invalid(&choice.path_of("mode"), "must be auto or required"));
        }
        let mut allowed = BTreeSet::new();
        for (index, tool) in choice.list("tools")?.into_iter().enumerate() {
            let mut tool = Fields::new(tool, format!("{path}.{index}"))?;
            if let Some(name) = self.function_of_choice(&mut tool)? {
                allowed.insert(name);
                tool.finish()?;
            }
        }
        choice.ignore(&["type"]);
        choice.finish()?;
        if allowed.is_empty() {
            Err(invalid(&path, "has no tool that can be called here"))
        } else {
            Ok((mode, allowed))
        }
    }

    /// The function that a choice names; `None` for a tool that is left out.
    fn function_of_choice(&self, choice: &mut Fields) -> Result<Option<String>, ApiError> {
        let name = match choice.required_text("type")?.as_str() {
            "function" | "custom" => {
                function_name(choice.text("namespace")?.as_deref(), &choice.required_text("name")?)
            }
            "local_shell" => SHELL.to_owned(),
            server_tool if SERVER_TOOLS.contains(&server_tool) => return Ok(None),
            other => return Err(unsupported(&choice.path, other)),
        };
        if self.known.contains_key(&name) {
            return Ok(Some(name));
        }
        Err(invalid(&choice.path, "names no tool in `tools`"))
    }

    /// Kinds of tools that were left out.
    pub(super) fn omitted_tools(&self) -> &BTreeSet<String> {
        &self.omitted
    }

    /// The item for a tool call.
    pub(super) fn call_item(&self, own: &str, Call { id, name, arguments }: Call) -> Value {
        let plain = Tool { kind: Kind::Function, namespace: None, name };
        let tool = self.known.get(&plain.name).unwrap_or(&plain);
        let read: Value = serde_json::from_str(&arguments).unwrap_or_default();
        if let (Kind::Shell, Value::Array(command)) = (tool.kind, &read["command"]) {
            let action = json!({"type": "exec", "command": command, "working_directory": read["working_directory"],
                "timeout_ms": read["timeout_ms"], "env": {}});
            return json!({"type": "local_shell_call", "id": own, "call_id": id, "action": action, "status": "completed"});
        }
        let mut item = if tool.kind == Kind::Custom {
            let input = read["input"].as_str().unwrap_or(&arguments);
            json!({"type": "custom_tool_call", "id": own, "call_id": id, "name": tool.name, "input": input})
        } else {
            json!({"type": "function_call", "id": own, "call_id": id, "name": tool.name, "arguments": arguments,
                "status": "completed"})
        };
        if let Some(namespace) = &tool.namespace {
            item["namespace"] = namespace.as_str().into();
        }
        item
    }
}

/// A call of an earlier turn in the format of chat completions; `None` for items that are not
/// calls.
pub(super) fn parse_call(kind: &str, item: &mut Fields) -> Result<Option<Value>, ApiError> {
    let (name, arguments) = match kind {
        "function_call" => (item.required_text("name")?, item.required_text("arguments")?),
        "custom_tool_call" => (
            item.required_text("name")?,
            json!({"input": item.required_text("input")?}).to_string(),
        ),
        "local_shell_call" => {
            let path = item.path_of("action");
            let action =
                Fields::new(item.take("action").unwrap_or_default(), path)?.remaining.into_iter();
            let action: Map<String, Value> =
                action.filter(|(name, value)| name != "type" && !value.is_null()).collect();
            (SHELL.to_owned(), Value::from(action).to_string())
        }
        _ => return Ok(None),
    };
    let (id, name) =
        (item.required_text("call_id")?, function_name(item.text("namespace")?.as_deref(), &name));
    Ok(Some(
        json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}),
    ))
}
