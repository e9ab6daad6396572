//! The program `ecso`.

use std::io::Write;

fn main() -> std::process::ExitCode {
    // Who reads no further (`ecso eval list | head`) has what they want: no panic, and no error. A full disk is an error.
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let said = panic.payload().downcast_ref::<String>().map_or("", String::as_str);
        match said.strip_prefix("failed printing to stdout: ") {
            Some(cause) if cause.starts_with("Broken pipe") => std::process::exit(0),
            Some(cause) => {
                let _ = writeln!(std::io::stderr(), "ecso: standard output: {cause}");
                std::process::exit(1);
            }
            None => usual(panic),
        }
    }));
    ecso_cli::main()
}
