"""Tools that a user could offer: familiar ones in many spellings and wholly made-up ones, with requests that fit them."""

import random
from dataclasses import dataclass

from words import ADJECTIVES, COLORS, NAMES, NOUNS, OPENERS, VERBS, any_word, city, made_up, person

LANGUAGES = "French German Spanish Italian Portuguese Dutch Polish Greek Turkish Arabic Hindi Japanese Korean Chinese Swedish Latin English".split()
CURRENCIES = "USD EUR GBP JPY CHF CAD AUD INR CNY SEK".split()
TICKERS = "AAPL MSFT GOOG AMZN TSLA NVDA META IBM INTC ORCL".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday today tomorrow tonight".split()
MONTHS = "January February March April May June July August September October November December".split()


@dataclass
class Call:
    """One tool as its JSON schema, a request of the user for it, and the call that serves the request."""
    schema: dict
    request: str
    arguments: dict


def _phrase(rng, low=1, high=4):
    return " ".join(any_word(rng) for _ in range(rng.randint(low, high)))


def _title(rng):
    return _phrase(rng, 1, 3).title() if rng.random() < 0.5 else _phrase(rng, 1, 4)


def _date(rng):
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(2020, 2030)
    return rng.choice([f"{year}-{month:02}-{day:02}", f"{MONTHS[month - 1]} {day}", rng.choice(DAYS), rng.choice(DAYS)])


def _time(rng):
    return rng.choice([f"{rng.randint(0, 23):02}:{rng.choice(['00', '15', '30', '45', '20'])}", f"{rng.randint(1, 12)}:{rng.randint(0, 59):02}", f"{rng.randint(1, 12)} pm", f"{rng.randint(1, 12)}am"])


def _email(rng):
    return f"{rng.choice([rng.choice(NAMES).lower(), made_up(rng, 2)])}@{rng.choice(['example', made_up(rng, 2), rng.choice(NOUNS)])}.{rng.choice(['com', 'org', 'net', 'io'])}"


def _file(rng):
    return rng.choice(["", "", "/tmp/", "docs/", "src/", "/home/" + made_up(rng, 1) + "/"]) + any_word(rng) + rng.choice(["", "_" + any_word(rng)]) + "." + rng.choice("txt md csv json rs py log pdf".split())


def _expression(rng):
    a, b, c = (rng.randint(1, 999) for _ in range(3))
    return rng.choice([f"{a} {o} {b}" for o in "+-*/"] + [f"{a}{o}{b}" for o in "+-*/"] + [f"({a} + {b}) * {c}", f"{a} + {b} - {c}", f"{a} * {b} + {c}"])


def _integer(low, high):
    return lambda rng: rng.randint(low, high)


def _decimal(rng):
    return rng.choice([rng.randint(1, 999), round(rng.uniform(0.1, 500), rng.randint(1, 2))])


# Kind of value: JSON type and how it is made. The user says a value exactly as the call must carry it.
KINDS = {
    "city": ("string", city), "person": ("string", person), "word": ("string", any_word), "phrase": ("string", _phrase), "title": ("string", _title),
    "date": ("string", _date), "time": ("string", _time), "email": ("string", _email), "file": ("string", _file), "expression": ("string", _expression),
    "language": ("string", lambda rng: rng.choice(LANGUAGES)), "currency": ("string", lambda rng: rng.choice(CURRENCIES)),
    "ticker": ("string", lambda rng: rng.choice(TICKERS) if rng.random() < 0.5 else "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(2, 5)))),
    "color": ("string", lambda rng: rng.choice(COLORS)), "noun": ("string", lambda rng: rng.choice(NOUNS) + ("s" if rng.random() < 0.2 else "")), "state": ("string", lambda rng: rng.choice(["on", "off"])),
    "unit": ("string", lambda rng: rng.choice(["celsius", "fahrenheit"])), "mode": ("string", lambda rng: rng.choice(["low", "medium", "high", "fast", "slow", "eco", "auto"])),
    "code": ("string", lambda rng: "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3))) + rng.choice(["", "-"]) + str(rng.randint(1, 9999))),
    "small": ("integer", _integer(1, 20)), "percent": ("integer", _integer(0, 100)), "number": ("integer", _integer(1, 999)), "large": ("integer", _integer(1000, 99999)),
    "decimal": ("number", _decimal), "sides": ("integer", _integer(2, 100)),
}
ENUMS = {"unit": ["celsius", "fahrenheit"], "state": ["on", "off"]}

# names | description | parameters (spellings/kind, "?" marks an optional one) | requests, where {0} is the first parameter's value
FAMILIAR = [line.strip().split(" | ") for line in """
get_weather getWeather weather current_weather get_current_weather weather_lookup fetch_weather get_weather_report | Get the current weather in a given location | city,location,place,town/city unit,units/unit? | Will it rain in {0}?;Is it sunny in {0}?;Is it cold in {0} today?;What's it like outside in {0}?;I'm flying to {0} tomorrow. How is the weather?;Look up the weather for {0}.;Show me the weather of {0}.;Can you tell me what the weather is like in {0}?;Do I need a coat in {0}?;Give me the weather report for {0}.;weather {0};What is the weather for {0} in {1}?;What's the temperature in {0}?;How hot is it in {0}?;{0} weather;Could you find out the weather in {0}?;I live in {0}. What is the weather?;What is the weather in {0}?;What's the weather like in {0}?;How is the weather in {0} today?;weather in {0};Tell me the weather in {0}.;Is it raining in {0}?;Is it warm in {0}?;How warm is it in {0} in {1}?;What is the temperature in {0} in {1}?;Check the weather for {0}.;I am going to {0}, what is the weather there?;What is the weather in {0} right now?;Get the weather for {0}.;Do I need an umbrella in {0}?;Please check the weather in {0} in {1}.;weather for {0} please;how's the weather in {0}
get_forecast weather_forecast forecast | Get the weather forecast for some days | city,location/city days,num_days,count/small | What is the {1} day forecast in {0}?;How will the weather be in {0} over the next {1} days?;Give me the forecast for {0} for the next {1} days.;What will the weather be in {0} for {1} days?;Forecast for {0}, {1} days.;Show me a {1} day forecast for {0}.
get_time current_time get_current_time clock world_clock time_in_city getTime | Get the current time in a city | city,location,timezone,place/city | Tell me the time in {0}.;How late is it in {0}?;I need the time in {0}.;What is the current time in {0}?;what time is it now in {0};Show the clock of {0}.;{0} time please;What time is it in {0}?;What's the time in {0}?;Tell me the current time in {0}.;current time in {0};time in {0}?;Do you know what time it is in {0}?
search web_search search_web google_search lookup find_information internet_search | Search the web for information | query,q,search_query,text/phrase | Search for information about {0}.;Please search for '{0}'.;Do a web search for {0}.;I want to know more about {0}, search for it.;Find out about {0}.;Run a search on {0}.;What can you find about {0}?;Look for {0} on the internet.;Search "{0}".;Use the search to find {0}.;Look up "{0}" on the web.;Is there anything online about {0}?;Search for {0}.;Search the web for {0}.;Look up {0}.;Find information about {0}.;Google {0}.;search {0};Can you search for {0}?;Find {0} online.;What does the web say about {0}?
calculator calculate calc compute evaluate_expression math_eval | Evaluate a mathematical expression | expression,expr,formula,input/expression | Please calculate {0}.;Use your calculator: {0};What does {0} equal?;Can you compute {0}?;Tell me the result of {0}.;I need {0} computed.;Solve {0}.;Calculate {0}.;What is {0}?;Compute {0}.;Use the calculator for {0}.;Evaluate {0}.;{0};Work out {0} with the calculator.;How much is {0}?
add add_numbers sum addition plus | Add two numbers | a,x,first,left,num1/number b,y,second,right,num2/number | Add {0} to {1}.;Please add {0} and {1} with the tool.;How much is {0} plus {1}?;What is the sum of {0} and {1}?;Add the numbers {0} and {1}.;Add {0} and {1}.;What is {0} + {1}?;Sum {0} and {1}.;What is {0} plus {1}?;Use the tool to add {0} and {1}.;{0} + {1};Compute {0} + {1}.
multiply product multiply_numbers times | Multiply two numbers | a,x,first,left/number b,y,second,right/number | Multiply {0} by {1}.;What is {0} times {1}?;{0} * {1};Use the tool to multiply {0} and {1}.
send_email email send_mail sendEmail compose_email | Send an email to a person | to,recipient,address,email/email subject,title/title? body,message,text,content/phrase? | Send an email to {0} saying {2}.;Please email {0} with subject {1}.;Write {0} an email about {1} that says {2}.;Send {0} an email: {2};Send an email to {0} with the subject {1} and the body {2}.;Email {0} and say {2}.;Send {2} to {0}.;Send an email to {0}.;Send an email to {0} with the subject "{1}".;Write an email to {0} with subject "{1}" and body "{2}".;Mail {0}: {2}
send_message text_message sms send_sms message_user post_message | Send a short message to someone | to,recipient,name,user,contact/person message,text,body,content/phrase | Send {0} a message saying {1}.;Send a message to {0} saying "{1}".;Let {0} know: {1};Please tell {0} "{1}".;Send a text to {0}: {1};Message {0} and say {1}.;Drop {0} a line: {1};Send a message to {0}: {1};Tell {0} {1}.;Text {0} that {1}.;Message {0} "{1}".;Send {0} the message "{1}".;Write to {0}: {1}
set_timer start_timer timer countdown create_timer | Start a timer | minutes,duration,duration_minutes,length/small label,name/noun? | Set a timer of {0} minutes.;I need a timer for {0} minutes.;Count down {0} minutes.;Set a {0}-minute timer.;Start the timer for {0} minutes.;Timer for {0} minutes please;Set a {0} minute timer for the {1}.;Set a timer for {0} minutes.;Start a {0} minute timer.;timer {0} minutes;Set a timer for {0} minutes called {1}.;Remind me in {0} minutes.;Please start a timer of {0} minutes for the {1}.;Start a {0} minute timer named {1}.
set_alarm create_alarm alarm wake_up | Set an alarm for a time of day | time,at,when/time | Set the alarm for {0}.;Set an alarm at {0}.;Please wake me at {0}.;Create an alarm for {0}.;Alarm for {0} please;Set an alarm for {0}.;Wake me up at {0}.;alarm at {0};Please set the alarm to {0}.;I need to get up at {0}.
create_reminder add_reminder set_reminder reminder | Create a reminder | text,task,title,reminder,what/phrase time,when,date,at/date? | Please remind me to {0}.;Set a reminder to {0}.;Do not let me forget to {0}.;Create a reminder to {0} for {1}.;Remind me to {0}.;Remind me to {0} on {1}.;Create a reminder: {0};Add a reminder "{0}" for {1}.;Set a reminder to {0} on {1}.
translate translate_text translation translator | Translate text into another language | text,input,phrase,sentence/phrase target_language,language,to,target_lang/language | Translate the word {0} into {1}.;Translate {0} to {1}.;Translate the sentence "{0}" into {1}.;Give me {0} in {1}.;What is the {1} word for {0}?;Can you translate '{0}' into {1}?;I need "{0}" in {1}.;Translate "{0}" to {1}.;Translate {0} into {1}.;How do you say "{0}" in {1}?;What is {0} in {1}?;Say {0} in {1}.;Please translate '{0}' to {1}.
convert_currency currency_converter exchange convert_money | Convert an amount of money between currencies | amount,value/number from_currency,source,from/currency to_currency,target,to/currency | Exchange {0} {1} for {2}.;What is {0} {1} in {2}?;Convert {0} {1} into {2}.;I have {0} {1}. How much is that in {2}?;Convert {0} {1} to {2}.;How much is {0} {1} in {2}?;What are {0} {1} worth in {2}?;Change {0} {1} into {2}.;{0} {1} to {2}
get_stock_price stock_price stock_quote get_quote quote | Get the price of a stock | symbol,ticker,stock/ticker | What's the price of {0}?;What is the current price of {0} stock?;Check the stock {0}.;Tell me the stock price of {0}.;How is {0} doing?;Price of {0}?;What is the stock price of {0}?;How much is {0} stock?;Get the price of {0}.;Quote {0}.;What is {0} trading at?;stock price {0};Look up the stock {0}.
play_music play_song play music_player | Play a song or an artist | song,title,track,query/title artist,by/person? | Please play {0}.;Can you play {0} by {1}?;Start playing {0}.;I would like to listen to {0}.;Play {0}.;Play {0} by {1}.;Play the song {0}.;I want to hear {0} by {1}.;Put on {0}.;Play "{0}" by {1}.
set_light control_light switch_light lights light_switch toggle_light | Switch the light of a room | room,location,area/noun state,status,action/state | Turn {1} the lights in the {0}.;Put the light in the {0} {1}.;{0} light {1};Turn {1} the {0} lights.;Can you turn {1} the light in the {0}?;Turn {1} the light in the {0}.;Turn the {0} light {1}.;Switch {1} the {0} light.;Lights {1} in the {0}.;Please switch the light in the {0} {1}.
set_temperature thermostat set_thermostat heating | Set the temperature of the thermostat | temperature,degrees,value,target/small room,zone,area/noun? | Turn the heating in the {1} up to {0} degrees.;I want {0} degrees in the {1}.;Change the temperature to {0}.;Set the heating to {0} degrees.;Set the temperature to {0} degrees.;Set the thermostat to {0}.;Make it {0} degrees in the {1}.;Heat the {1} to {0} degrees.;Set the {1} to {0} degrees.
read_file open_file cat view_file load_file get_file | Read a file | path,file,filename,file_path/file | Please read the file {0}.;What does {0} say?;Show the contents of {0}.;Load {0}.;Can you open {0}?;Display {0}.;Read {0}.;Open the file {0}.;Show me {0}.;What is in {0}?;Read the file {0}.;Print the contents of {0}.;cat {0}
write_file save_file create_file | Write text to a file | path,file,filename/file content,text,data/phrase | Write "{1}" into the file {0}.;Store {1} in {0}.;Make a file {0} that says "{1}".;Write {1} to {0}.;Save "{1}" in {0}.;Create the file {0} with the content "{1}".;Put {1} into the file {0}.
delete_file remove_file rm | Delete a file | path,file,filename/file | I no longer need {0}, delete it.;Erase {0}.;Throw away the file {0}.;Delete {0}.;Remove the file {0}.;Please delete the file {0}.;Get rid of {0}.
run_command bash shell execute exec terminal | Run a shell command | command,cmd/phrase | Please run {0}.;Run '{0}'.;Run the command {0} in the terminal.;Type `{0}` for me.;Use the shell to run {0}.;Execute `{0}`.;Start `{0}`.;Run {0}.;Execute the command {0}.;Run the command "{0}".;Run `{0}` in the shell.
list_files ls list_directory | List the files of a folder | path,directory,folder,dir/word | What is in the folder {0}?;Show me the files of {0}.;List {0}.;Which files are in {0}?;List the files in {0}.;What files are in {0}?;Show the folder {0}.;ls {0}
book_table reserve_table book_restaurant make_reservation | Book a table in a restaurant | restaurant,name,place/title people,guests,party_size,seats/small time,when,at/time? | Book a table for {1} at {0}.;Get us a table at {0} for {1} people.;We are {1} people and want to eat at {0} at {2}.;Book a table at {0} for {1} people.;Reserve a table for {1} at {0} at {2}.;Book a table for {1} people at {0} at {2}.;I need a table for {1} at {0}.
book_flight search_flights find_flights flight_search | Find flights between two cities | origin,from,departure,from_city/city destination,to,arrival,to_city/city date,day,when/date? | Find me a flight from {0} to {1} on {2}.;Fly from {0} to {1}.;I need to get from {0} to {1} on {2}, find a flight.;Show flights from {0} to {1}.;Are there flights from {0} to {1}?;Book me a flight to {1} from {0}.;Find a flight from {0} to {1}.;Book a flight from {0} to {1} on {2}.;Flights from {0} to {1} on {2}.;I want to fly from {0} to {1}.;Search flights from {0} to {1}.
get_distance distance route directions get_directions | Find the distance between two places | from,origin,start/city to,destination,end/city | How many kilometers is it from {0} to {1}?;Give me directions from {0} to {1}.;How far apart are {0} and {1}?;Route from {0} to {1}.;How far is it from {0} to {1}?;What is the distance between {0} and {1}?;How do I get from {0} to {1}?;Distance from {0} to {1}.
create_event add_event schedule_meeting add_to_calendar calendar_add | Add an event to the calendar | title,name,summary,event/title date,day,when/date time,at,start/time? | Schedule a {0} on {1}.;Put {0} on my calendar for {1}.;Plan {0} for {1} at {2}.;Add an event called {0} on {1}.;Schedule {0} for {1}.;Add {0} to my calendar on {1} at {2}.;Create an event {0} on {1} at {2}.;Put "{0}" in the calendar for {1}.
roll_dice dice roll throw_dice | Roll dice with a number of sides | sides,faces,n/sides count,dice,times/small? | Throw a die with {0} sides.;Roll a d{0}.;Please roll {1} dice with {0} sides.;Roll a die with {0} sides.;Roll a {0} sided die.;Roll {1} dice with {0} sides.;Throw {1} dice with {0} sides each.;roll a d{0}
random_number random_int pick_number | Pick a random number in a range | min,low,from,start/small max,high,to,end/number | I need a random number between {0} and {1}.;Choose a number from {0} to {1}.;Pick a random number between {0} and {1}.;Give me a random number from {0} to {1}.;random number {0} to {1}
get_user find_user lookup_user user_info get_customer | Look up a user | name,user,username,user_id/person | Find the user {0}.;Look up {0}.;Get the user {0}.;Search the users for {0}.;Get user info for {0}.;Look up the user {0}.;Find {0} in the user list.;Who is {0}?;Get the account of {0}.;Show me the profile of {0}.
get_order order_status track_order track_package track | Get the status of an order | order_id,id,order,tracking_number,number/code | Look up order {0}.;Please look up order {0}.;What happened to my order {0}?;Find order {0}.;Get the status of {0}.;Is order {0} on its way?;Check the status of order {0}.;When will {0} arrive?;Order {0}, where is it?;look up the order {0};Where is my order {0}?;Track the order {0}.;What is the status of order {0}?;Track {0}.;Check order {0}.
add_to_cart order order_item buy purchase | Order an item in the shop | item,product,name,article/noun quantity,count,amount,number/small | Order {1} {0}s.;Put {1} {0} into my cart.;Please order {1} {0}.;I need {1} {0}s, order them.;Order {1} of the {0}.;Buy {1} {0}s.;Add {1} {0} to the cart.;I want to buy {1} {0}.;Get me {1} pieces of {0}.
add_todo create_task add_task todo | Add a task to the list | task,title,text,item,name/phrase priority,level/mode? | Note down the task {0}.;New task: {0};Add "{0}" to my tasks.;I have to {0}, put it on the list.;Add {0} to my list.;Add the task "{0}".;Add {0} to my list with {1} priority.;Create a task: {0};Put {0} on the to-do list.
define dictionary get_definition define_word | Look up the meaning of a word | word,term/word | Give me the definition of {0}.;What is a {0}?;Explain the word {0}.;Tell me the meaning of {0}.;What does the word {0} mean?;Define {0}.;What does {0} mean?;Look up the word {0}.;What is the meaning of "{0}"?;definition of {0}
convert_units unit_converter convert | Convert a value between units | value,amount,number/number from_unit,from,source/measure to_unit,to,target/measure | Change {0} {1} to {2}.;Convert {0} {1} into {2}.;What are {0} {1} in {2}?;Convert {0} {1} to {2}.;How many {2} are {0} {1}?;What is {0} {1} in {2}?
get_news news latest_news headlines | Get the latest news about a topic | topic,query,subject,about/phrase | Tell me the news about {0}.;What is new about {0}?;Get the news on {0}.;Give me headlines about {0}.;What is the news about {0}?;Show me the latest news on {0}.;News about {0}.;Any news on {0}?
get_recipe find_recipe recipe | Find a recipe | dish,name,ingredient,query/noun | How can I make {0}?;Find me a {0} recipe.;What can I cook with {0}?;Find a recipe for {0}.;How do I cook {0}?;I want a {0} recipe.;Give me a recipe with {0}.
set_volume volume change_volume | Set the volume | level,volume,percent,value/percent | Set the volume to {0} percent.;Turn it to {0}.;Change the volume to {0}.;Put the volume at {0}.;Set the volume to {0}.;Volume {0}.;Turn the volume to {0} percent.;Make it {0} percent loud.
call_phone call_contact phone_call dial | Call a person on the phone | name,contact,person,who/person | I want to talk to {0} on the phone.;Make a call to {0}.;Ring {0}.;Call {0}.;Phone {0}.;Please call {0} for me.;Give {0} a call.;Dial {0}.
paint_wall set_color change_color paint | Paint a thing in a color | object,thing,target,item/noun color,colour,paint/color | Give the {0} a {1} color.;Paint my {0} in {1}.;I want a {1} {0}.;Turn the {0} {1}.;The {0} should be {1}.;Paint the {0} {1}.;Make the {0} {1}.;Change the color of the {0} to {1}.;Color the {0} in {1}.
query_database run_query sql lookup_record find_record get_record | Find a record by its id | id,record_id,key/code table,collection/noun? | Fetch the record {0}.;Query {1} for {0}.;Give me record {0}.;Find the record {0}.;Get record {0} from the {1} table.;Look up {0} in {1}.;Show me the record {0}.
""".strip().splitlines()]
KINDS["measure"] = ("string", lambda rng: rng.choice("meters feet inches miles kilometers grams pounds liters gallons kilograms yards".split()))


def _properties(rng, chosen):
    properties = {}
    for name, kind in chosen:
        schema = {"type": KINDS[kind][0]}
        if kind in ENUMS and rng.random() < 0.6:
            schema["enum"] = ENUMS[kind]
        if rng.random() < 0.35:
            words = name.replace("_", " ").lower()
            schema["description"] = rng.choice([f"The {words}", f"{words.capitalize()} to use", words, f"The {words}, e.g. {KINDS[kind][1](rng)}", f"Name of the {words}", f"The {words}, e.g. {city(rng)}, {rng.choice(['CA', 'UK', 'TX'])}", f"The {words} that the user wants, for example {any_word(rng)} or {any_word(rng)}.", f"the user's {words}"])
        properties[name] = schema
    return properties


def _schema(rng, name, description, chosen, required):
    schema = {"name": name}
    if rng.random() < 0.9:
        schema["description"] = description + rng.choice(["", "", "", ".", ".", ". Use it when the user asks for it.", ". Returns JSON.", " for the user.", ". Call this tool only when needed."])
    schema["parameters"] = {"type": "object", "properties": _properties(rng, chosen)}
    if rng.random() < 0.85:
        schema["parameters"]["required"] = required
    if rng.random() < 0.1:
        schema["parameters"]["additionalProperties"] = False
    if rng.random() < 0.07:
        schema["strict"] = True
    return schema


def _restyle(rng, name):
    """Other spellings of snake_case: camelCase, kebab-case, a prefix."""
    pick = rng.random()
    if pick < 0.08 and "_" in name:
        head, *rest = name.split("_")
        return head + "".join(part.capitalize() for part in rest)
    if pick < 0.12:
        return name.replace("_", "-")
    return name + f"_{rng.choice(['v2', 'tool', 'api', 'now', '2'])}" if pick < 0.18 else name


def familiar(rng: random.Random, held_out: bool = False) -> Call:
    """A tool as people write them; the last request of each tool is kept for the held-out split."""
    names, description, parameters, requests = rng.choice(FAMILIAR)
    chosen, required = [], []
    for parameter in parameters.split():
        spellings, kind = parameter.split("/")
        name = rng.choice(spellings.split(","))
        chosen.append((name, kind.rstrip("?")))
        if not kind.endswith("?"):
            required.append(name)
    requests = requests.split(";")
    kept = len(requests) - 1
    template = rng.choice(requests[kept:] if held_out else requests[:kept])
    values = [KINDS[kind][1](rng) for _, kind in chosen]
    used = [place for place in range(len(chosen)) if f"{{{place}}}" in template]
    schema = _schema(rng, _restyle(rng, rng.choice(names.split())), description, chosen, required)
    if rng.random() < 0.3:  # Offered without its optional parameters.
        for place, (name, _) in enumerate(chosen):
            if place not in used and name not in required:
                del schema["parameters"]["properties"][name]
    arguments = {chosen[place][0]: values[place] for place in used}
    return Call(schema, _polite(rng, template).format(*values), arguments)


def _polite(rng, template):
    if rng.random() < 0.15 and template[0].isupper() and not template.endswith("?"):
        template = rng.choice(OPENERS) + template[0].lower() + template[1:]
    pick = rng.random()
    if pick < 0.12:
        template = template.rstrip(".?")
    elif pick < 0.22:
        template = template[0].lower() + template[1:]
    elif pick < 0.27:
        template = template + rng.choice([" Thanks!", " Please.", " Use a tool.", " Use the tool."])
    return template


# How a value of each kind is spoken of, and the parameters that carry it; the last phrase is kept for the held-out split.
SPOKEN = {kind: (keys.split(), phrases.split("|")) for kind, keys, phrases in (line.split(" ; ") for line in """
city ; city location place town destination where region ; in {v}|for {v}|to {v}|near {v}|at {v}|from {v}|over in {v}|around {v}
person ; person name user customer recipient owner contact who client guest employee patient ; for {v}|to {v}|by {v}|of {v}|named {v}|with {v}|called {v}|belonging to {v}|together with {v}
date ; date day when due_date deadline ; on {v}|for {v}|by {v}|from {v}|until {v}|starting {v}
time ; time at when start_time hour ; at {v}|by {v}|for {v}|until {v}|at exactly {v}
counted ; - ; for {v} {k}|with {v} {k}|{v} {k}|by {v} {k}|to {v} {k}|of {v} {k}|in {v} {k}|at {v} {k}|up to {v} {k}|after {v} {k}
small ; count quantity amount number times copies ; {v} times|with {v} pieces|with {v}|of {v}|a total of {v}
number ; amount number value total ; of {v}|with {v}|for {v}|to {v}|by {v}|up to {v}
large ; id number amount budget code year ; number {v}|with number {v}|with the id {v}|for {v}|of {v}|with id {v}|{v}|no. {v}
decimal ; amount price value weight ; of {v}|for {v}|to {v}|at {v}|worth {v}|costing {v}
color ; color colour shade paint ; in {v}|{v}|with {v} color|in the color {v}|with {v}|painted {v}
percent ; percent level volume brightness intensity strength ; to {v} percent|at {v} percent|to {v}|at {v}|to {v}%|at {v}%|to a level of {v}|around {v} percent
code ; id code reference order_id item_id sku serial ticket_id account ; with id {v}|number {v}|{v}|with the code {v}|with code {v}|for {v}|of {v}|reference {v}|under {v}
email ; email address to recipient ; to {v}|at {v}|for {v}|from {v}|via {v}
file ; file path filename source target ; from {v}|to {v}|in {v}|using {v}|with the file {v}|out of {v}
mode ; mode setting speed priority level ; in {v} mode|on {v}|with {v} priority|at {v} speed|set to {v}|to {v}|on the {v} setting
phrase ; text message note content description reason query topic ; "{v}"|about {v}|saying {v}|saying "{v}"|with the text {v}|with the note "{v}"|because of {v}|: {v}|that says {v}
title ; title name label subject ; called {v}|named {v}|titled {v}|"{v}"|with the title "{v}"|with the name {v}|under the name {v}
word ; name label tag keyword key word ; called {v}|named {v}|"{v}"|with the tag {v}|for {v}|tagged {v}
noun ; item object thing product room part ; for the {v}|in the {v}|of the {v}|with the {v}|on the {v}|to the {v}|next to the {v}
language ; language lang target_language ; in {v}|into {v}|to {v}|using {v}
currency ; currency money target_currency ; in {v}|to {v}|into {v}|paid in {v}
ticker ; symbol ticker stock code ; of {v}|for {v}|{v}|on {v}|about {v}
""".strip().splitlines())}
UNITS = """minutes hours days nights weeks seconds seats guests people pages steps degrees meters kilometers miles liters pieces
points rooms copies tickets cups grams stars players rounds months years dollars euros coins bags boxes""".split()
KINDS["counted"] = ("integer", _integer(1, 200))
SYNONYMS = {"lookup": "look up|find|check", "create": "make|set up|add", "delete": "remove|get rid of|erase", "send": "mail|ship", "fetch": "get|bring me", "get": "fetch|show me", "start": "begin|switch on",
            "stop": "end|halt|switch off", "find": "look for|search for", "check": "look at|test", "update": "change|modify", "cancel": "call off|drop", "schedule": "plan|arrange", "order": "buy|get me", "book": "reserve|get me",
            "search": "look for|find", "show": "display|let me see", "repair": "fix|mend", "clean": "wash|tidy up", "calculate": "work out|compute", "inspect": "look at|examine", "notify": "inform|tell", "turn": "rotate|spin",
            "query": "ask for|look up", "launch": "start|fire up", "assign": "give|allocate", "register": "sign up|enter", "submit": "hand in|send", "activate": "turn on|switch on", "measure": "gauge|find the size of",
            "save": "store|keep", "load": "open|read", "approve": "accept|confirm", "reset": "clear|restart", "fill": "fill up|top up", "heat": "warm up|heat up", "cool": "cool down|chill", "list": "show|name"}
GETTERS = "get check fetch find lookup look_up show read query count list search".split()
QUESTIONS = ["What is the {n} of {v}?", "What's the {n} for {v}?", "Show me the {n} of {v}.", "I need the {n} of {v}.", "Tell me the {n} for {v}.", "Do you know the {n} of {v}?",
             "What {n} does {v} have?", "Give me the {n} of {v}.", "Can you get the {n} for {v}?", "{n} of {v}", "How is the {n} of {v}?", "Which {n} belongs to {v}?", "{v}: what is the {n}?",
             "How many {n}s does {v} have?", "How many {n}s are in {v}?", "Is there a {n} for {v}?", "Look up the {n} of {v}.", "Find the {n} for {v}.", "What about the {n} of {v}?", "Please report the {n} of {v}."]
QUESTIONS[:0] = ["Look up {n} {v}.", "Please look up {n} {v}.", "Look up the {n} {v}.", "Check {n} {v}.", "Find {n} {v}.", "Get {n} {v}.", "Show me {n} {v}.", "Please check the {n} of {v}.", "Fetch the {n} {v}.",
                 "I want to see {n} {v}.", "What do we know about {n} {v}?", "Give me {n} {v}.", "Can you look up {n} {v}?", "What happened to {n} {v}?", "How many units of {v} are there?", "Where is {n} {v}?"]
LISTED = ["{k} {v}", "{k} {v}", "the {k} {v}", "{k} = {v}", "{k}={v}", "{k}: {v}", "{k} set to {v}", "{k} of {v}", "{k} as {v}", "{v} as {k}", "{v} as the {k}", "{v} for {k}",
          "{k} being {v}", "a {k} of {v}", "{k} should be {v}", "{k} is {v}", "the {k} is {v}", "{k} to {v}", "{k} -> {v}", "{k} ({v})"]
LISTED_HELD_OUT = ["{k} equal to {v}", "{v} for the {k}", "the {k} set to {v}"]

# Words that may stand before a value without saying anything of it: nobody can list them all, so values must be
# told by what they are. None of them is in a phrase that is kept for the held-out split.
CONNECTORS = """across|against|along with|alongside|amid|and the|as|as well as|attached to|based on|before|behind|below|beneath|beside|between|beyond|bound for|bringing|
carrying|close to|coming from|concerning|containing|covering|dated|despite|directed at|due|during|expecting|featuring|following|given|given to|having|held by|holding|
including|inside|instead of|involving|joined by|just|kept at|kept in|labelled|like|limited to|listed as|made of|marked|matching|meant for|measuring|minus|moving to|namely|
nearly|numbered|off|onto|opposite|outside|over|owned by|past|per|placed in|plus|precisely|priced at|ranked|reaching|regarding|related to|roughly|sent to|shown as|since|
sized|somewhere in|thanks to|through|throughout|toward|upon|valued at|versus|wearing|while|within|without|written in|yielding""".replace("\n", "").split("|")
STATED = """are|at|becoming|changed to|chosen as|comes to|corresponding to|fixed at|given as|given by|going to|has to be|having|holding|is now|like|made|matching|must be|namely|
put at|raised to|reading|reads|shall be|should read|stands at|that is|turned to|which is|will be|with value|with the value|would be|:=|=>|~|/""".replace("\n", "").split("|")
TELLERS = "State Recall Print Quote Bring Reveal Note Explain Determine Discover Identify Name Describe Confirm Collect Return Retrieve Compute Pull Announce".split()


def _connector(rng, words=CONNECTORS):
    return made_up(rng, 2) if rng.random() < 0.06 else rng.choice(words)


def _stated(rng):
    """A way of spelling out a key and its value that may be new."""
    words = _connector(rng, STATED)
    return rng.choice(["{k} " + words + " {v}"] * 4 + ["the {k} " + words + " {v}", "the {k} " + words + " {v}", "{v} " + words + " {k}", "{v} in the {k} field", "{v} at {k}",
                                                       "{v} goes into {k}", "for {k} take {v}", "let {k} be {v}", "my {k} " + words + " {v}"])


def invented(rng: random.Random, held_out: bool = False) -> Call:
    """A tool that nobody has seen: a verb and a noun, or nonsense, with up to four parameters."""
    nonsense = rng.random() < 0.3
    verb = made_up(rng, 2) if nonsense else rng.choice(VERBS)
    noun = made_up(rng, 2) if nonsense and rng.random() < 0.5 or rng.random() < 0.1 else rng.choice(NOUNS)
    name = rng.choice([f"{verb}_{noun}"] * 4 + [f"{noun}_{verb}", f"{verb}{noun.capitalize()}", f"{verb}-{noun}", f"{verb}_the_{noun}", f"{verb}_{noun}s", f"{verb}_{noun}_{rng.choice(NOUNS)}", verb])
    description = rng.choice([f"{verb.capitalize()} the {noun}", f"{verb.capitalize()} a {noun}", f"{verb.capitalize()}s the {noun} of the {rng.choice(NOUNS)}", f"A tool to {verb} the {noun}", f"{verb.capitalize()} some {noun}s"])
    make = rng.choices([_asked, _natural, _listed], [0.15, 0.5, 0.35])[0]
    chosen, text = make(rng, verb, noun, name, held_out)
    if make is _asked:
        getter = rng.choice(GETTERS)
        name = rng.choice([f"{getter}_{noun}", f"{getter}_{noun}", f"{getter}{noun.capitalize()}", f"{getter}_{noun}s", f"{noun}_{getter}", noun, f"{noun}_info"])
        description = rng.choice([f"{getter.replace('_', ' ').capitalize()} the {noun}", f"Get the {noun} of something", f"{noun.capitalize()} lookup"])
    elif make is _natural and rng.random() < 0.06:  # Only the description tells what it is for.
        name = rng.choice([f"tool_{rng.randint(1, 99)}", f"{made_up(rng, 2)}", f"function_{rng.choice('abcdef')}", f"action{rng.randint(1, 9)}"])
    schema = _schema(rng, name, description, [(key, kind) for key, kind, _ in chosen], [key for key, _, _ in chosen])
    return Call(schema, text, {key: value for key, _, value in chosen})


def _key(rng, kind):
    pick = rng.random()
    if kind == "counted":
        return rng.choice(UNITS)
    if pick < 0.65 and kind in SPOKEN:
        return rng.choice(SPOKEN[kind][0])
    key = kind if pick < 0.75 else rng.choice(NOUNS + ["level", "count", "speed", "size", "width", "height", "name", "target", "id", "label", "reason", "duration", "note", "category", "distance", "depth"])
    if rng.random() < 0.15:
        key = rng.choice(ADJECTIVES) + "_" + key
    return made_up(rng, 2) if rng.random() < 0.1 else key


def _asked(rng, verb, noun, name, held_out):
    """A question for a property of one thing."""
    kind = rng.choice(["city", "person", "code", "ticker", "word", "large", "file", "title", "noun"])
    value = KINDS[kind][1](rng)
    question = rng.choice(QUESTIONS[-3:] if held_out else QUESTIONS[:-3])
    if not held_out and rng.random() < 0.2:
        question = rng.choice(TELLERS) + rng.choice([" the {n} of {v}.", " the {n} for {v}.", " the {n} {v}.", " {n} {v}.", f" the {{n}} {_connector(rng)} {{v}}."])
    question = question.format(n=noun, v=f"the {value}" if kind == "noun" else value)
    return [(_key(rng, kind), kind, value)], question if rng.random() < 0.8 else question[0].lower() + question[1:].rstrip("?.")


def _natural(rng, verb, noun, name, held_out):
    """As people speak: the thing acted on first, then what prepositions say; the keys are hardly ever named."""
    chosen, pieces = [], []
    if verb in SYNONYMS and rng.random() < 0.35:
        verb = rng.choice(SYNONYMS[verb].split("|"))
    if rng.random() < 0.5:  # The object is a value too: "water the roses" for water_plants(plant).
        kind = rng.choice(["noun", "noun", "word", "code", "title", "person", "phrase"])
        value = KINDS[kind][1](rng)
        key = rng.choice([noun, noun, f"{noun}_name", f"{noun}_id", "item", "object", "name", "target", "thing", noun + "s"])
        chosen.append((key, kind, value))
        action = verb + " " + rng.choice([f"the {value}", f"the {value}", f"{value}", f"{noun} {value}", f"the {noun} {value}", f'"{value}"', f"my {value}", f"a {value}"])
    else:
        action = verb + " " + rng.choice([f"the {noun}", f"a {noun}", f"my {noun}", f"{noun}s", f"some {noun}", f"the {noun}s", "something", noun])
    for kind in rng.sample(list(SPOKEN), rng.choices([0, 1, 2, 3], [0.1, 0.45, 0.35, 0.1])[0]):
        value, phrases = KINDS[kind][1](rng), SPOKEN[kind][1]
        key = _key(rng, kind)
        if key in [k for k, _, _ in chosen]:
            continue
        chosen.append((key, kind, value))
        phrase = phrases[-1] if held_out and len(phrases) > 4 else rng.choice(phrases[:-1])
        if not held_out and rng.random() < 0.35:
            phrase = _connector(rng) + (" {v} {k}" if kind == "counted" else rng.choice([" {v}", " {v}", " {v}", " the {v}", ' "{v}"' if KINDS[kind][0] == "string" else " {v}"]))
        pieces.append(phrase.format(v=value, k=key.replace("_", " ")))
    order = list(range(len(pieces)))
    if rng.random() < 0.4:
        rng.shuffle(order)
    text = " ".join([action] + [pieces[place] for place in order]).replace(" : ", ": ")
    if rng.random() < 0.3:  # The schema's order is not the order of speech.
        rng.shuffle(chosen)
    return chosen, _opened(rng, text)


def _listed(rng, verb, noun, name, held_out):
    """Keys and values spelled out."""
    kinds = rng.sample([kind for kind in KINDS if kind != "expression"], rng.choices([0, 1, 2, 3, 4], [0.05, 0.33, 0.37, 0.2, 0.05])[0])
    values = {_key(rng, kind): (kind, KINDS[kind][1](rng)) for kind in kinds}
    chosen = [(key, kind, value) for key, (kind, value) in values.items()]
    join = rng.choice(LISTED_HELD_OUT if held_out else LISTED)
    if not held_out and rng.random() < 0.4:
        join = _stated(rng)
    pieces = [join.format(k=key.replace("_", " ") if rng.random() < 0.9 else key, v=f'"{value}"' if isinstance(value, str) and rng.random() < 0.2 else value) for key, _, value in chosen]
    if rng.random() < 0.25:
        rng.shuffle(pieces)
    listing = ""
    if pieces:
        last = rng.choice([" and ", " and ", ", ", " and with "]) if len(pieces) > 1 else ""
        listing = rng.choice([" with ", " with ", " using ", " for ", ", ", ": ", " where "]) + ", ".join(pieces[:-1]) + last + pieces[-1]
    action = rng.choice([f"{verb} the {noun}", f"{verb} the {noun}", f"{verb} a {noun}", f"use {name}", f"call {name}", f"use the {name} tool", f"call the tool {name}", f"run {name}", f"invoke {name}", f"use {name} to {verb} it"])
    return chosen, _opened(rng, action + listing)


def _opened(rng, text):
    opener = rng.choice(["", "", "", "", rng.choice(OPENERS), "I want to ", "I would like to ", "Let us ", "We need to ", "I have to ", "You should ", "please "])
    text = opener + text
    text = text[0].upper() + text[1:] if rng.random() < 0.8 else text
    return text + ("?" if "ould you" in opener or "an you" in opener else rng.choice([".", ".", "", "!", " please.", " now."]))


# Sentences around a request that say nothing the call needs.
BEFORE = ["I need your help.", "I am planning a trip.", "I have a question.", "It is getting late.", "My boss asked me.", "{p} told me to ask you.", "I am with {p}.", "Good morning!", "Hello.", "Hi there,", "Let us begin.",
          "We are at home.", "I am busy today.", "Sorry to bother you.", "This is urgent.", "OK, next one.", "I am {p}.", "Listen:", "One more thing:", "Now to something else.", "I like {n}s.", "Thanks for that."]
AFTER = ["It is for {p}.", "I need it soon.", "My friend {p} wants to know.", "Thank you so much!", "Thanks in advance.", "It is important.", "I am in a hurry.", "Then we are done.", "That would be great.", "Cheers, {p}", "You have the tools for it.", "Use your tools."]


def _surrounded(rng, call):
    pick = rng.random()
    text = call.request
    if pick < 0.1:
        text = rng.choice(BEFORE).format(p=person(rng), n=rng.choice(NOUNS)) + " " + text
    elif pick < 0.17:
        text = text + ("" if text[-1] in ".?!" else ".") + " " + rng.choice(AFTER).format(p=person(rng), n=rng.choice(NOUNS))
    call.request = text
    return call


def any_call(rng: random.Random, held_out: bool = False) -> Call:
    return _surrounded(rng, familiar(rng, held_out) if rng.random() < 0.45 else invented(rng, held_out))
