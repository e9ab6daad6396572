//! The program `ecso`.

fn main() -> std::process::ExitCode {
    // Who reads no further (`ecso eval list | head`) has what they want: no panic, and no error.
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let said = panic.payload().downcast_ref::<String>().map_or("", String::as_str);
        if said.starts_with("failed printing to stdout: Broken pipe") {
            std::process::exit(0);
        }
        usual(panic);
    }));
    ecso_cli::main()
}
